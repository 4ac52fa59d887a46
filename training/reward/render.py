"""Prompt and response -> the ids a reward model reads, one way for training it and for scoring with it.

What does not fit is cut from the left of the prompt: the end of a conversation says most about what a good answer is. A response that
does not fit by itself is cut from its end, and from its beginning where a chat template renders it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from training.config import RewardRender
from training.render import apply_template

SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}


@dataclass(frozen=True)
class RewardInput:
    """One prompt with one response, as a reward model reads it."""

    ids: list[int]
    segments: (
        list[int] | None
    )  # 0 for the prompt's tokens, 1 for the response's; None where the model has no such input
    cut: bool  # something did not fit

    def reads_as(self, other: "RewardInput") -> bool:
        """Return whether a model reads the same of both."""
        return (self.ids, self.segments) == (other.ids, other.segments)


class RewardRenderer:
    """Renders pairs with a reward model's own fast tokenizer; `max_tokens` counts special tokens too."""

    def __init__(self, tokenizer: Any, *, render: RewardRender, max_tokens: int) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"tokenizer {tokenizer.name_or_path}: got a slow one, expected tokenizer.json beside the weights"
            )
        if render is RewardRender.chat_template and not tokenizer.chat_template:
            raise ValueError(
                f"tokenizer {tokenizer.name_or_path}: got no chat template, which render=chat_template needs; "
                "take render=text_pair or a model with a template"
            )
        self.tokenizer = tokenizer
        self._render = render
        self._max_tokens = max_tokens
        self._has_segments = "token_type_ids" in tokenizer.model_input_names

    def __call__(self, prompts: Sequence[list[dict[str, str]]], responses: Sequence[str]) -> list[RewardInput]:
        """Return the inputs of prompts[n] with responses[n], in order."""
        if self._render is RewardRender.chat_template:
            return self._render_chats(prompts, responses)
        return self._render_pairs([join_turns(prompt) for prompt in prompts], responses)

    def _render_pairs(self, texts: Sequence[str], responses: Sequence[str]) -> list[RewardInput]:
        """Join prompt and response by the tokenizer's own frame, such as `[CLS] prompt [SEP] response [SEP]`."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # "[SEP]" in a response is text: nobody writes a frame by hand
        different = {text: n for n, text in enumerate(dict.fromkeys(texts))}  # the K responses of a row share a prompt
        prompts = backend.encode_batch(list(different), add_special_tokens=False)
        answers = backend.encode_batch(list(responses), add_special_tokens=False)
        room = self._max_tokens - backend.num_special_tokens_to_add(is_pair=True)
        fits = [len(prompts[different[t]].ids) + len(a.ids) <= room for t, a in zip(texts, answers, strict=True)]
        for answer in answers:
            answer.truncate(room - 1)  # at least one token of the prompt stays
        backend.enable_truncation(self._max_tokens, strategy="only_first", direction="left")
        joined = [backend.post_process(prompts[different[t]], a) for t, a in zip(texts, answers, strict=True)]
        backend.no_truncation()
        return [
            RewardInput(pair.ids, pair.type_ids if self._has_segments else None, cut=not fit)
            for pair, fit in zip(joined, fits, strict=True)
        ]

    def _render_chats(self, prompts: Sequence[list[dict[str, str]]], responses: Sequence[str]) -> list[RewardInput]:
        turns = [
            [*prompt, {"role": "assistant", "content": response}]
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        rows = apply_template(self.tokenizer, turns, as_text=True)  # nobody writes a turn's frame by hand
        return [RewardInput(self._cut_left(ids), None, cut=len(ids) > self._max_tokens) for ids in rows]

    def _cut_left(self, ids: list[int]) -> list[int]:
        """Return the last `max_tokens` ids, a leading BOS kept: models trained with one read nonsense without it."""
        if len(ids) <= self._max_tokens:
            return list(ids)
        head = [ids[0]] if ids[0] == self.tokenizer.bos_token_id else []
        return [*head, *ids[len(ids) - self._max_tokens + len(head) :]]


def join_turns(prompt: list[dict[str, str]]) -> str:
    """Return a conversation as one text: a lone question as it is, several turns with their speakers named."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{SPEAKERS[message['role']]}: {message['content']}" for message in prompt)
