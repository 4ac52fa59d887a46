"""What stands beside a running benchmark: progress, the request to stop, and a look at the ids that are really sent."""

import threading
import time
from pathlib import Path
from typing import Any

from training.job import Interrupted
from training.metrics import MetricsWriter

PROGRESS_SECONDS = 1.0
SHOWN_IDS = 16


class Watch:
    """Sees every forward pass and every finished request of one benchmark; changes none of them."""

    def __init__(self, metrics: Path, *, stop: threading.Event) -> None:
        self.bos: int | None = None
        self.truncated = 0  # prompts cut from the left to fit
        self.cut: set[str] = set()  # prompts whose answers the token limit ended
        self._metrics = metrics
        self.stop = stop
        self._done = self._total = 0
        self._written = 0.0
        metrics.write_bytes(b"")  # a benchmark starts from its first item, so an earlier attempt's lines are void

    def expect(self, requests: int) -> None:
        """Announce requests to come."""
        self._total += requests
        self._write()

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """Count one request as done. lm-eval calls this for each, under this name: it is where its cache would listen."""
        self._done += 1
        if self._done == self._total or time.monotonic() - self._written > PROGRESS_SECONDS:
            self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        with MetricsWriter(self._metrics, total=self._total, keep_bytes=self._metrics.stat().st_size) as metrics:
            metrics.write(self._done)

    def before_forward(self, *_: Any) -> None:
        """Raise Interrupted when asked to stop: a forward pre-hook."""
        if self.stop.is_set():
            raise Interrupted("benchmark")

    def look(self, ids: list[int]) -> None:
        """Raise ValueError when the ids that are to be sent begin with two BOS tokens."""
        if self.bos is not None and ids[:2] == [self.bos, self.bos]:
            raise ValueError(
                f"a prompt begins with two BOS tokens (id {self.bos}): the first ids sent are {ids[:SHOWN_IDS]}; expected one. Chat "
                "template and tokenizer each add one, or the tokenizer adds two; remove one of them from the model folder"
            )
