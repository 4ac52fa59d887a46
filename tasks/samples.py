"""What a policy answers while it trains, on its way to people: a table of the step's MLflow run, and of its artifact."""

import json
import time
from pathlib import Path
from typing import Any

from infra.store import Store, StoreError
from infra.tracking import Run, Tracking, TrackingError
from training.job import ANSWERS_FILE

TABLE = "answers.json"
COLUMNS = ("step", "prompt", "answer", "truncated")
SHIP_SECONDS = 10.0


class SamplesMirror:
    """Puts the answers where MLflow shows them as a table, whenever there are new ones; call it as often as you like.

    MLflow or the store may be slow or away: the file has it all, and the finished table goes into the artifact.
    """

    def __init__(self, output: Path, *, store: Store, tracking: Tracking, run: Run) -> None:
        self._output, self._store, self._tracking, self._run = output, store, tracking, run
        self._shown = 0  # bytes of the file that the shown table is of
        self._next_ship = 0.0

    def __call__(self) -> None:
        """Show what is new, at most every SHIP_SECONDS."""
        if time.monotonic() < self._next_ship:
            return
        lines = read_lines(self._output / ANSWERS_FILE)
        size = sum(map(len, lines))
        if size == self._shown:
            return
        self._next_ship = time.monotonic() + SHIP_SECONDS
        try:
            self._store.put(f"{self._store.name_of(self._run.artifact_uri)}/{TABLE}", make_table(lines))
            self._tracking.show_table(self._run.id, TABLE)
        except (StoreError, TrackingError):
            return
        self._shown = size

    def close(self) -> None:
        """Write the table beside the answers, where the commit takes it up."""
        lines = read_lines(self._output / ANSWERS_FILE)
        if not lines:
            return
        (self._output / TABLE).write_bytes(make_table(lines))
        self._next_ship = 0.0
        self()


def read_lines(path: Path) -> list[bytes]:
    """Return the whole lines of a file; none where there is no file."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return [line for line in lines if line.endswith(b"\n")]


def make_table(lines: list[bytes]) -> bytes:
    """Return the answers as MLflow keeps tables: the names of the columns, and the rows."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    table = {"columns": list(COLUMNS), "data": [[row[name] for name in COLUMNS] for row in rows]}
    return json.dumps(table, ensure_ascii=False).encode()
