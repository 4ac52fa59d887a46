"""From a parsed source row to prompt and responses, or the reason why not."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from training.config import IngestConfig, ResponseRegime, SourceFormat

Message = dict[str, str]
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
ROLES = ("system", "user", "assistant")


class Reason(StrEnum):
    """Why a row is in quarantine."""

    not_json = "not_json"
    unknown_shape = "unknown_shape"
    missing_field = "missing_field"
    not_text = "not_text"
    empty_prompt = "empty_prompt"
    empty_response = "empty_response"
    short_response = "short_response"
    same_responses = "same_responses"
    different_prompts = "different_prompts"
    bad_preferred = "bad_preferred"
    bad_truncated = "bad_truncated"
    missing_logq = "missing_logq"
    bad_logq = "bad_logq"
    unknown_role = "unknown_role"
    roles_out_of_order = "roles_out_of_order"
    last_turn_not_user = "last_turn_not_user"
    last_turn_not_assistant = "last_turn_not_assistant"
    too_long = "too_long"
    duplicate = "duplicate"
    contradiction = "contradiction"


class UnusableRow(Exception):  # noqa: N818 - an outcome, counted and written down, not an error of the run
    """A row that goes to quarantine."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Preference:
    """A prompt, its K responses, the index of the preferred one where somebody said, and how samples came to be."""

    prompt: list[Message]
    responses: list[str]
    preferred: int | None
    truncated: list[bool] | None = None  # cut by an answer cap
    logq: list[float] | None = None  # of samples of another policy: nats


def detect_format(value: Any) -> SourceFormat | None:
    """Return the format that a row's keys speak of, None for a row that looks like none."""
    if not isinstance(value, dict):
        return None
    if "responses" in value:
        return SourceFormat.responses
    if "chosen" in value and "rejected" in value:
        is_dialogue = isinstance(value["chosen"], str) and "prompt" not in value
        return SourceFormat.hh_rlhf if is_dialogue else SourceFormat.pairs
    return None


def parse_row(value: Any, *, format: SourceFormat, config: IngestConfig) -> Preference:
    """Return the row's prompt and responses; raise UnusableRow with the first reason that speaks against it.

    In the `support` regime equal responses are one response, and none is empty. A sampled set keeps them all: how often a text was
    drawn, and that nothing was, is what makes the importance weights right.
    """
    if not isinstance(value, dict):
        raise UnusableRow(Reason.unknown_shape, f"got {type(value).__name__}, expected an object")
    row = PARSERS[format](value)
    row = replace(row, truncated=_read_truncated(value, count=len(row.responses)))
    if config.responses is ResponseRegime.support:
        row = _drop_equal_responses(row)
        _check_responses(row.responses, shortest=config.min_response_chars)
    if config.responses is ResponseRegime.from_behaviour:
        row = replace(row, logq=_read_logq(value, count=len(row.responses)))
    _check_text(row)
    _check_roles(row.prompt)
    chars = sum(len(message["content"]) for message in row.prompt) + max(map(len, row.responses))
    if chars > config.max_row_chars:
        raise UnusableRow(Reason.too_long, f"{chars} characters, at most {config.max_row_chars} (max_row_chars)")
    return row


def _parse_hh(value: dict[str, Any]) -> Preference:
    chosen, rejected = (_split_dialogue(_take(value, key, str), key) for key in ("chosen", "rejected"))
    return _pair(chosen, rejected)


def _split_dialogue(text: str, key: str) -> list[Message]:
    before, *parts = HH_TURN.split(text)
    if before.strip() or not parts:
        raise UnusableRow(Reason.unknown_shape, f"{key!r} does not start with a '\\n\\nHuman:' turn")
    return [
        {"role": HH_ROLES[name], "content": content.strip()}
        for name, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _parse_pairs(value: dict[str, Any]) -> Preference:
    """Read chosen and rejected as texts, as one assistant message each, or as conversations that include the prompt.

    A prompt that is a dialogue as HH-RLHF writes it, up to where the answer begins, is one with either answer behind it.
    """
    if isinstance(before := value.get("prompt"), str) and HH_TURN.match(before):
        return _parse_hh({key: before + _take(value, key, str) for key in ("chosen", "rejected")})
    prompt = _read_prompt(_take(value, "prompt", (str, list))) if value.get("prompt") is not None else None
    chosen, rejected = (_read_answer(_take(value, key, (str, list)), key, prompt) for key in ("chosen", "rejected"))
    return _pair(chosen, rejected)


def _read_answer(answer: str | list[Any], key: str, prompt: list[Message] | None) -> list[Message]:
    """Return the whole conversation that ends with this answer: its own where that ends with the prompt, else the prompt where that ends with
    what the answer brings of it."""
    turns = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else _read_messages(answer, key)
    if prompt is None:
        if len(turns) < 2:
            raise UnusableRow(Reason.missing_field, f"no 'prompt', and {key!r} is no conversation that includes it")
        return turns
    before = turns[:-1]
    longer, shorter = (before, prompt) if len(before) > len(prompt) else (prompt, before)
    if longer[len(longer) - len(shorter) :] != shorter:
        raise UnusableRow(Reason.different_prompts, f"'prompt' is not what comes before the last turn of {key!r}")
    return [*longer, *turns[-1:]]


def _parse_responses(value: dict[str, Any]) -> Preference:
    responses = [_read_response(item, k) for k, item in enumerate(_take(value, "responses", list))]
    if len(responses) < 2:
        raise UnusableRow(Reason.missing_field, f"{len(responses)} responses, expected at least 2")
    preferred = value.get("preferred")
    if preferred is not None and (type(preferred) is not int or not 0 <= preferred < len(responses)):
        raise UnusableRow(Reason.bad_preferred, f"got {preferred!r}, expected an index below {len(responses)} or null")
    return Preference(_read_prompt(_take(value, "prompt", (str, list))), responses, preferred)


def _read_response(item: Any, index: int) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, list):
        turns = _read_messages(item, f"responses[{index}]")
        if len(turns) == 1 and turns[0]["role"] == "assistant":
            return turns[0]["content"]
    raise UnusableRow(Reason.missing_field, f"responses[{index}]: expected a text, or a list of one assistant message")


PARSERS = {
    SourceFormat.hh_rlhf: _parse_hh,
    SourceFormat.pairs: _parse_pairs,
    SourceFormat.responses: _parse_responses,
}


def _take(value: dict[str, Any], key: str, kind: type | tuple[type, ...]) -> Any:
    if value.get(key) is None:
        raise UnusableRow(Reason.missing_field, f"no {key!r}; the keys are {sorted(value)}")
    if not isinstance(value[key], kind):
        raise UnusableRow(Reason.missing_field, f"{key!r} is {type(value[key]).__name__}, expected text or messages")
    return value[key]


def _read_prompt(prompt: str | list[Any]) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _read_messages(prompt, "prompt")


def _read_messages(items: Sequence[Any], key: str) -> list[Message]:
    messages = []
    for n, item in enumerate(items):
        if not isinstance(item, dict) or not all(isinstance(item.get(name), str) for name in ("role", "content")):
            raise UnusableRow(Reason.missing_field, f"{key}[{n}]: expected {{'role': text, 'content': text}}")
        messages.append({"role": item["role"], "content": item["content"]})
    return messages


def _pair(chosen: list[Message], rejected: list[Message]) -> Preference:
    """Return a preference of two conversations that must differ in their last turn alone."""
    for key, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns or turns[-1]["role"] != "assistant":
            raise UnusableRow(Reason.last_turn_not_assistant, f"{key!r} ends without an answer")
    if chosen[:-1] != rejected[:-1]:
        raise UnusableRow(Reason.different_prompts, "'chosen' and 'rejected' differ before the last Assistant turn")
    responses = [chosen[-1]["content"], rejected[-1]["content"]]
    if responses[0] == responses[1] and responses[0].strip():
        raise UnusableRow(Reason.same_responses, "'chosen' equals 'rejected'")
    return Preference(chosen[:-1], responses, preferred=0)


def _read_truncated(value: dict[str, Any], *, count: int) -> list[bool] | None:
    truncated = value.get("truncated")
    if truncated is None:
        return None
    if not isinstance(truncated, list) or len(truncated) != count or not all(type(cut) is bool for cut in truncated):
        raise UnusableRow(Reason.bad_truncated, f"got {truncated!r:.80}, expected {count} times true or false")
    return truncated


def _read_logq(value: dict[str, Any], *, count: int) -> list[float]:
    """Return log q of each response; without it a sample of another policy has no importance weight."""
    logq = value.get("logq")
    if logq is None:
        raise UnusableRow(
            Reason.missing_logq, f"no 'logq'; responses from_behaviour need {count} log-probabilities in nats"
        )
    if not isinstance(logq, list) or len(logq) != count:
        raise UnusableRow(Reason.bad_logq, f"got {logq!r:.80}, expected a list of {count} numbers, one a response")
    for k, item in enumerate(logq):
        if type(item) not in (int, float) or not -sys.float_info.max <= item <= 0:  # NaN is not
            raise UnusableRow(Reason.bad_logq, f"logq[{k}] is {item!r:.80}, expected a finite number, at most 0")
    return [float(item) for item in logq]


def _drop_equal_responses(row: Preference) -> Preference:
    first = {text: row.responses.index(text) for text in row.responses}  # place of each text
    unique = list(first)
    if len(unique) == 1 and unique[0].strip():
        raise UnusableRow(Reason.same_responses, f"all {len(row.responses)} responses are equal")
    preferred = None if row.preferred is None else unique.index(row.responses[row.preferred])
    truncated = None if row.truncated is None else [row.truncated[place] for place in first.values()]
    return replace(row, responses=unique, preferred=preferred, truncated=truncated)


def _check_text(row: Preference) -> None:
    for text in (*(message["content"] for message in row.prompt), *row.responses):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UnusableRow(Reason.not_text, f"half a surrogate pair at character {error.start}") from error


def _check_roles(prompt: list[Message]) -> None:
    """Hold a conversation to: system at most once and first, then user and assistant in turn, user last, none empty."""
    roles = [message["role"] for message in prompt]
    unknown = sorted(set(roles) - set(ROLES))
    if unknown:
        raise UnusableRow(Reason.unknown_role, f"got {', '.join(map(repr, unknown))}, expected {', '.join(ROLES)}")
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or not all(message["content"].strip() for message in prompt):
        raise UnusableRow(Reason.empty_prompt, "the prompt, or a turn of it, is empty")
    if turns[-1] != "user":
        raise UnusableRow(Reason.last_turn_not_user, f"the prompt ends with a turn of {turns[-1]!r}")
    if any(role != ("user", "assistant")[n % 2] for n, role in enumerate(turns)):
        raise UnusableRow(Reason.roles_out_of_order, f"got {' '.join(roles)}, expected user and assistant in turn")


def _check_responses(responses: list[str], *, shortest: int) -> None:
    for k, response in enumerate(responses):
        if not response.strip():
            raise UnusableRow(Reason.empty_response, f"response {k} is empty")
        if len(response) < shortest:
            raise UnusableRow(
                Reason.short_response, f"response {k} has {len(response)} characters, at least {shortest} wanted"
            )
