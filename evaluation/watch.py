"""What stands beside a running benchmark: progress, the request to stop, and a look at the ids that are really sent.

Legend: B requests of a batch, T tokens.
"""

import threading
import time
from pathlib import Path
from typing import Any

import torch

from training.job import Interrupted
from training.metrics import MetricsWriter

PROGRESS_SECONDS = 1.0
SHOWN_IDS = 16


class Watch:
    """Sees every forward pass and every finished request of one benchmark; changes none of them."""

    def __init__(self, metrics: Path, *, stop: threading.Event) -> None:
        self.bos: int | None = None
        self.truncated = 0  # prompts cut from the left to fit
        self._metrics = metrics
        self._stop = stop
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

    def before_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise Interrupted when asked to stop, and ValueError when a prompt begins with two BOS tokens.

        A forward pre-hook: `args[0]` or `input_ids` is BT, the attention mask, where there is one, marks left padding by 0.
        """
        if self._stop.is_set():
            raise Interrupted("benchmark")
        ids_BT = args[0] if args else kwargs["input_ids"]
        if self.bos is None or ids_BT.shape[1] < 2:
            return
        mask_BT = kwargs.get("attention_mask")
        if mask_BT is None or mask_BT.shape != ids_BT.shape:
            mask_BT = torch.ones_like(ids_BT)
        first_B = mask_BT.argmax(dim=1)
        second_B = (first_B + 1).clamp(max=ids_BT.shape[1] - 1)
        is_bos_BT = ids_BT == self.bos
        rows_B = torch.arange(len(ids_BT), device=ids_BT.device)
        doubled_B = is_bos_BT[rows_B, first_B] & is_bos_BT[rows_B, second_B] & (second_B > first_B)
        if doubled_B.any():
            row = int(doubled_B.int().argmax())
            head = ids_BT[row, first_B[row] :][:SHOWN_IDS].tolist()
            raise ValueError(
                f"a prompt begins with two BOS tokens (id {self.bos}): the first ids sent are {head}; expected one. Chat "
                "template and tokenizer each add one, or the tokenizer adds two; remove one of them from the model folder"
            )
