"""A judge that is a chat model of this machine: greedy, in the project's own generation."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np

from evaluation.judges.config import JudgeConfig, JudgeRuntime, LocalJudge
from evaluation.judges.judge import Conversation, Finish, Reply
from training.config import GenerateConfig
from training.data.batch import pack_by_tokens
from training.memory import run_in_halves
from training.model import digest_model, find_context, load_policy, start_torch
from training.render import apply_template
from training.sampling import find_stop_ids, generate_batch

WINDOW = 64  # conversations that are sorted into batches together


class LocalModel:
    """The judge as a backend."""

    def __init__(
        self,
        judge: LocalJudge,
        folder: Path,
        *,
        config: JudgeConfig,
        runtime: JudgeRuntime,
        check_stop: Callable[[], None],
    ) -> None:
        self._model, self._tokenizer = load_policy(folder, precision=judge.precision, device=start_torch(runtime))
        digests = asdict(digest_model(folder, self._tokenizer))
        self.name = f"local@{digests['weights_sha256'][:12]}"
        self.identity = judge.model_dump(mode="json") | digests | {"max_answer_tokens": config.max_answer_tokens}
        self._stop_ids = find_stop_ids(self._model, self._tokenizer)
        self._greedy = GenerateConfig(
            temperature=0.0, max_new_tokens=config.max_answer_tokens, precision=judge.precision
        )
        self._budget, self._check_stop = runtime.microbatch_tokens, check_stop
        self._context = find_context(self._model.config)

    def answer(self, conversations: Iterator[tuple[int, Conversation]]) -> Generator[tuple[int, Reply]]:
        """Yield replies, batch by batch; see `evaluation.judges.judge.Backend`. What does not fit into the model's context is refused."""
        while window := list(islice(conversations, WINDOW)):
            fitting = []
            for number, conversation in window:
                # What an answer holds by name is text: no policy can end the judge's turn, or make it refuse.
                ids = apply_template(self._tokenizer, conversation, add_generation_prompt=True, as_text=True)
                if self._context is not None and len(ids) + self._greedy.max_new_tokens > self._context:
                    words = f"{len(ids)} tokens and an answer of {self._greedy.max_new_tokens} exceed the context of {self._context}"
                    yield number, Reply(words, "refused", "", 0, 0)
                else:
                    fitting.append((number, ids))
            for members in pack_by_tokens([len(ids) for _, ids in fitting], budget=self._budget):
                batch = [fitting[member] for member in members]
                for (number, ids), new in zip(
                    batch, run_in_halves(self._generate, [ids for _, ids in batch]), strict=True
                ):
                    yield number, self._read(ids, new)

    def _generate(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        nothing_BS = np.zeros((len(prompts), self._greedy.max_new_tokens))  # greedy: no number is drawn
        return generate_batch(
            self._model,
            prompts,
            noise_BS=nothing_BS,
            stop_ids=self._stop_ids,
            config=self._greedy,
            check_stop=self._check_stop,
        )

    def _read(self, prompt: list[int], new: list[int]) -> Reply:
        text = self._tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        finish: Finish = "stop" if new[-1] in self._stop_ids else "length"
        return Reply(text, finish, self.name, len(prompt), len(new))

    def close(self) -> None:
        """Nothing is held open."""
