"""Chat template -> token ids, and which of them are trained: the response and the token that ends it.

Trained tokens come from spans, never from the pad id, so a tokenizer that pads with its stop token still learns to stop. A span is
held to its response: a template that writes something of its own into the answer would have it trained as if its author had.

What was sampled here is not read from its text again, which may be other tokens, and other log-probabilities: the policy is free to
write what its tokenizer would not (special tokens, half a character, "a" + "b" for "ab").
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

import numpy as np
from jinja2 import TemplateError

# T tokens of prompt and response, K responses of a row

# The day that templates are told: today's would make stored numbers those of other prompts tomorrow. Llama 3's writes this one where it knows none.
TODAY = datetime(2024, 7, 26)
DATE_PARTS = ("d", "-d", "B", "b", "m", "-m", "Y", "y", "A", "a", "H", "I", "M", "S", "p")  # of strftime


class UnusableRow(ValueError):  # noqa: N818 - a row to drop and count, not a fault
    """A row that cannot be used: it cannot be rendered faithfully, or has too little to train on. `reason` is one word, for counting."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Rendered:
    """One prompt with one response. `ids_T[start:]` are the trained tokens, the stop token last."""

    ids_T: np.ndarray  # int32
    start: int
    respaced: bool = False  # the template writes other white space at the ends of the response than its author

    @property
    def num_trained(self) -> int:
        """Trained tokens: the response's and the stop token."""
        return len(self.ids_T) - self.start

    @property
    def inputs(self) -> np.ndarray:
        """The ids that go through a model: all but the last, which predicts nothing."""
        return self.ids_T[:-1]


def render_prompt(tokenizer: Any, prompt: list[dict[str, str]]) -> list[int]:
    """Return the ids of a conversation up to and including the cue for the assistant's next turn; UnusableRow as `apply_template`, and for a
    turn that holds a special token by name: it would be read as one, and end the turn, say, where its author did not."""
    for message in prompt:
        if marker := next((text for text in marker_texts(tokenizer) if text in message["content"]), None):
            raise UnusableRow(
                "marker_in_prompt",
                f"the {message['role']}'s turn holds {marker!r}, a special token of this tokenizer; expected text without any",
            )
    ids: list[int] = apply_template(tokenizer, prompt, add_generation_prompt=True)
    return ids


def apply_template(
    tokenizer: Any, conversations: list[Any], *, add_generation_prompt: bool = False, as_text: bool = False
) -> Any:
    """Return the ids of a conversation, or of each of several; UnusableRow where the template refuses it. With `as_text` special tokens that
    a turn holds by name are read as text, by a tokenizer that can."""
    listed = tokenizer.chat_control_tokens
    if as_text and listed is None:
        tokenizer.chat_control_tokens = []  # else whatever the template writes: models are trained on `<think>` in an answer
    try:
        return tokenizer.apply_chat_template(
            conversations,
            chat_template=stop_clock(tokenizer.get_chat_template()),
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=False,
            date_string=TODAY.strftime("%d %b %Y"),
            sanitize_control_tokens=as_text,
        )
    except TemplateError as refusal:
        raise UnusableRow(
            "template_refuses",
            f"the chat template refuses the conversation ({refusal}); expected one that it takes; leave out what it names, or take "
            "another template",
        ) from refusal
    except ValueError as refusal:
        if "sanitize" not in str(refusal):  # some vocabularies have no other pieces for a special token's name
            raise
        if isinstance(conversations[0], Mapping):
            return apply_template(tokenizer, conversations, add_generation_prompt=add_generation_prompt)
        return [
            apply_template(tokenizer, turns, add_generation_prompt=add_generation_prompt, as_text=True)
            for turns in conversations
        ]
    finally:
        tokenizer.chat_control_tokens = listed


@cache
def stop_clock(template: str) -> str:
    """Return a chat template for which it is TODAY: its `strftime_now`, where it asks for one, is a macro of that name before it."""
    if "strftime_now" not in template:
        return template
    written = "".join(f"|replace('%{name}', '{TODAY.strftime(f'%{name}')}')" for name in DATE_PARTS)
    return f"{{% macro strftime_now(format) %}}{{{{ format{written} }}}}{{% endmacro %}}\n{template}"  # the line's end is trimmed


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids that the tokenizer treats as markers, end-of-turn tokens among them."""
    added = (token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset(tokenizer.all_special_ids) | frozenset(added)


@cache
def marker_texts(tokenizer: Any) -> tuple[str, ...]:
    """Return the special tokens of a tokenizer by name."""
    return tuple(filter(None, tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))))


class Renderer:
    """Renders rows with one tokenizer's chat template. Nothing is ever cut: a row longer than `max_tokens` is refused.

    ValueError for a template that doubles the BOS, or that ends the assistant's turn without a stop token.
    """

    def __init__(self, tokenizer: Any, *, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._markers = special_ids(tokenizer)
        probe = [{"role": "user", "content": "a"}]
        prompt_ids = render_prompt(tokenizer, probe)
        bos = tokenizer.bos_token_id
        if bos is not None and prompt_ids[:2] == [bos, bos]:
            raise ValueError(
                f"chat template: a prompt begins with two BOS tokens (id {bos}); expected one; "
                "remove the BOS from the template or from the tokenizer"
            )
        # Some templates write more markers behind the stop token (an end of text, say). The first one is what stops.
        self._num_end_markers = len(self._markers_in(self._conversations(probe, ["b"])[0], start=len(prompt_ids)))
        if self._num_end_markers == 0:
            raise ValueError(
                "chat template: the assistant's turn ends without a stop token; expected a special token after the "
                "response, or the model never learns to stop; take a template with an end-of-turn token"
            )

    def stored(self, row: Mapping[str, Any], places: Sequence[int] | None = None) -> list[Rendered]:
        """Render the responses of a row of the schema at some places, all of them by default, or raise UnusableRow.

        Those that were sampled here are the tokens that were drawn, others are rendered from their text as by `row`.
        """
        chosen = range(len(row["responses"])) if places is None else places
        if row["response_ids"] is not None:
            return self.sampled(row["prompt"], [row["response_ids"][k] for k in chosen])
        truncated = row["truncated"] or [False] * len(row["responses"])
        return self.row(row["prompt"], [row["responses"][k] for k in chosen], [truncated[k] for k in chosen])

    def sampled(self, prompt: list[dict[str, str]], response_ids: Sequence[Sequence[int]]) -> list[Rendered]:
        """Render a prompt with each of its K responses as drawn, each ending with a stop token unless it was cut."""
        prompt_ids = render_prompt(self._tokenizer, prompt)
        for ids in response_ids:
            self._check_length(len(prompt_ids) + len(ids))
        return [
            Rendered(ids_T=np.asarray([*prompt_ids, *ids], dtype=np.int32), start=len(prompt_ids))
            for ids in response_ids
        ]

    def row(
        self, prompt: list[dict[str, str]], responses: Sequence[str], truncated: Sequence[bool] | None = None
    ) -> list[Rendered]:
        """Render a prompt with each of its K responses, or raise UnusableRow.

        Trained is the response as its author wrote it, but for white space at its ends, which is the template's to write or to
        trim. Anything else between cue and stop token is refused.
        A response marked `truncated` was cut by the answer cap: its tokens are trained, a stop token that its author never
        wrote is not.
        """
        prompt_ids = render_prompt(self._tokenizer, prompt)
        cut = truncated or [False] * len(responses)
        all_ids = self._conversations(prompt, responses)
        return [
            self._span(prompt_ids, ids, response, cut_short=c)
            for ids, response, c in zip(all_ids, responses, cut, strict=True)
        ]

    def _span(self, prompt_ids: list[int], ids: list[int], response: str, *, cut_short: bool) -> Rendered:
        """Return the span of one response in the ids of the whole conversation, which ends with its stop token."""
        start = len(prompt_ids)
        if ids[:start] != prompt_ids:
            raise UnusableRow(
                "prompt_not_prefix",
                "the prompt's ids are not a prefix of the conversation's: the tokenizer joins the prompt's end to the "
                "response, or the template rewrites earlier turns",
            )
        found = self._markers_in(ids, start=start)
        if len(found) < self._num_end_markers:
            raise UnusableRow(
                "no_stop_token",
                f"the chat template writes {len(found)} special tokens after the response {response!r:.80}, {self._num_end_markers} after "
                "others; expected as many after each, or the model would not learn where it ends; take a template that ends every "
                "assistant's turn alike",
            )
        if len(found) > self._num_end_markers:
            raise UnusableRow("marker_in_response", f"a response holds a special token (id {ids[found[0]]})")
        respaced = self._is_respaced(ids[start : found[0]], response)
        end = self._end_of_author(ids, start, found[0], response) if cut_short else found[0] + 1
        if end == start:
            raise UnusableRow("empty_response", "a truncated response has no tokens to train")
        self._check_length(end)
        return Rendered(ids_T=np.asarray(ids[:end], dtype=np.int32), start=start, respaced=respaced)

    def _end_of_author(self, ids: list[int], start: int, end: int, response: str) -> int:
        """Return where a response that was cut ends, without the white space that the template writes behind it: its author had not come to
        the end."""
        if not response.strip():
            return start
        kept = len(response) - len(response.rstrip())
        while len(text := self._decode(ids[start : end - 1])) - len(text.rstrip()) >= kept and (
            text.strip() == self._decode(ids[start:end]).strip()
        ):
            end -= 1
        return end

    def _check_length(self, tokens: int) -> None:
        if tokens > self._max_tokens:
            raise UnusableRow("too_long", f"{tokens} tokens, the longest allowed is {self._max_tokens}")

    def _is_respaced(self, ids: list[int], response: str) -> bool:
        """Return whether white space at its ends is all that sets these ids apart from the response; UnusableRow if more does."""
        text = self._decode(ids)
        if text == response:
            return False
        # Not every tokenizer gives back what it read (it composes accents, say), so the response goes through it too.
        expected = self._decode(self._tokenizer.encode(response, add_special_tokens=False))
        if text.strip() != expected.strip():
            raise UnusableRow(
                "response_rewritten",
                f"the chat template writes {text!r:.80} for the response {expected!r:.80}; expected the response as it is; take a "
                "template that writes what it adds before the response into the cue for it too, or adds nothing",
            )
        return text != expected

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _conversations(self, prompt: list[dict[str, str]], responses: Sequence[str]) -> list[list[int]]:
        turns = [[*prompt, {"role": "assistant", "content": response}] for response in responses]
        ids: list[list[int]] = apply_template(self._tokenizer, turns)
        return ids

    def _markers_in(self, ids: list[int], *, start: int) -> list[int]:
        return [index for index in range(start, len(ids)) if ids[index] in self._markers]
