"""Greedy answers of a policy to a few held-out prompts while it trains: what no figure shows.

`answers.jsonl` has a line for each step and prompt: `step` (0 is before the first), `row_id`, `prompt`, `answer`, `truncated`.
Nothing is drawn and nothing of the model is changed, so training goes on as if nobody had asked.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.config import GenerateConfig
from training.data.examples import Example
from training.distributed import World
from training.job import write_whole
from training.logprobs import Policy
from training.memory import run_in_halves
from training.model import find_context
from training.sampling import find_stop_ids, generate_batch
from training.sharding import reshard

MOST_PROMPTS = 4
GREEDY = GenerateConfig(temperature=0.0, max_new_tokens=48)


class Sampler:
    """Answers the first prompts that the model's context has room for; several ranks answer together, the first one writes."""

    def __init__(
        self, policy: Policy, tokenizer: Any, examples: Sequence[Example], path: Path, *, world: World
    ) -> None:
        self._policy, self._tokenizer, self._path, self._world = policy, tokenizer, path, world
        self._stop_ids = find_stop_ids(policy.model, tokenizer)
        prompts = [(e.row_id, e.samples[0].ids_T[: e.samples[0].start].tolist()) for e in examples]
        context = find_context(policy.model.config) or np.inf
        fitting = [(row_id, ids) for row_id, ids in prompts if len(ids) + GREEDY.max_new_tokens <= context]
        self._prompts = fitting[:MOST_PROMPTS]

    def start(self, step: int) -> None:
        """Keep of an earlier attempt what it wrote up to the step that this one goes on from."""
        if not self._world.is_first or not self._prompts:
            return
        kept: list[bytes] = []
        if step and self._path.is_file():
            lines = self._path.read_bytes().splitlines(keepends=True)  # of bytes: at line feeds alone
            kept = [line for line in lines if line.endswith(b"\n") and read_step(line) <= step]
        with write_whole(self._path) as out:
            out.write(b"".join(kept).decode())

    def write(self, step: int) -> None:
        """Append the answers after so many steps. Every rank calls it."""
        if not self._prompts:
            return
        answers = self._policy(self._answer_all)
        reshard(self._policy)
        if not self._world.is_first:
            return
        with self._path.open("a") as out:
            for (row_id, ids), tokens in zip(self._prompts, answers, strict=True):
                line = {
                    "step": step,
                    "row_id": row_id,
                    "prompt": self._decode(ids),
                    "answer": self._decode(tokens),
                    "truncated": tokens[-1] not in self._stop_ids,
                }
                out.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _answer_all(self, model: Any) -> list[list[int]]:
        prompts = [ids for _, ids in self._prompts]
        if self._world.size > 1:  # a rank that answered in halves would gather layers more often than the others
            return self._answer(model, prompts)
        return run_in_halves(lambda some: self._answer(model, some), prompts)

    def _answer(self, model: Any, prompts: Sequence[list[int]]) -> list[list[int]]:
        return generate_batch(
            model,
            prompts,
            noise_BS=np.zeros((len(prompts), 0)),
            stop_ids=self._stop_ids,
            config=GREEDY,
            check_stop=lambda: None,
            to_the_end=self._world.size > 1,  # all ranks gather as often, whatever each of them makes of a near tie
        )


def read_step(line: bytes) -> float:
    """Return the step that a line of answers is of; infinity for what a power cut has left of one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf
