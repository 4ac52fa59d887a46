"""Metrics as JSON lines in a local file, so that training neither waits for nor fails with a tracking server.

A line: `{"time": unix seconds, "step": 12, "total": 80, "train/loss": 1.23, ...}`. `step` of `total` is progress, and
progress is liveness; everything else is a finite number to be mirrored. NaN and inf never reach the file: they are counted
under `<name>_nonfinite`.
"""

import json
import math
import os
import time
from pathlib import Path
from types import TracebackType


class MetricsWriter:
    """Appends lines to `path`; with `keep_bytes` it first cuts the file there, so that a resumed run repeats no step.

    A file that is shorter, as after a power cut, is cut behind its last whole line.
    """

    def __init__(self, path: Path, *, total: int, keep_bytes: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = path.read_bytes()[:keep_bytes] if path.exists() else b""
        self._file = path.open("ab")
        self._file.truncate(kept.rfind(b"\n") + 1)
        self._file.seek(0, os.SEEK_END)
        self._total = total

    def write(self, step: int, metrics: dict[str, float] | None = None) -> None:
        """Append one line, whole, for `step` of the total."""
        line: dict[str, float] = {"time": round(time.time(), 3), "step": step, "total": self._total}
        for name, value in (metrics or {}).items():
            key = name if math.isfinite(value) else f"{name}_nonfinite"
            line[key] = value if math.isfinite(value) else 1
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def offset(self) -> int:
        """Bytes written so far; a checkpoint stores it."""
        return self._file.tell()

    def sync(self) -> None:
        """Force what was written to disk: before a checkpoint that tells of it is there itself."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
