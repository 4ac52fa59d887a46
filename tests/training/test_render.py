"""Rendering: prompt ids are a true prefix, the response and its stop token are trained, the rest is refused by name."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from training.render import Renderer, UnusableRow, render_prompt

PROMPT = [{"role": "user", "content": "How do I bake bread?"}]


@pytest.fixture
def tokenizer(tiny_policy: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_policy)


def test_trained_tokens_are_the_response_and_its_stop_token(tokenizer: Any) -> None:
    first, second = Renderer(tokenizer, max_tokens=200).row(PROMPT, ["Mix flour.", ""])
    assert tokenizer.decode(first.ids_T[first.start :]) == "Mix flour.<|im_end|>"
    assert tokenizer.decode(second.ids_T[second.start :]) == "<|im_end|>"
    assert first.ids_T[: first.start].tolist() == render_prompt(tokenizer, PROMPT)
    assert first.ids_T.tolist().count(tokenizer.bos_token_id) == 1


def test_stop_token_is_trained_where_padding_is_the_same_token(tokenizer: Any) -> None:
    before = Renderer(tokenizer, max_tokens=200).row(PROMPT, ["Mix flour."])[0]
    tokenizer.pad_token = tokenizer.eos_token
    after = Renderer(tokenizer, max_tokens=200).row(PROMPT, ["Mix flour."])[0]
    assert after.ids_T.tolist() == before.ids_T.tolist()
    assert after.ids_T[-1] == tokenizer.pad_token_id


def test_truncated_response_gets_no_stop_token(tokenizer: Any) -> None:
    whole, cut = Renderer(tokenizer, max_tokens=200).row(PROMPT, ["Mix it", "Mix it"], [False, True])
    assert cut.ids_T.tolist() == whole.ids_T.tolist()[:-1]
    with pytest.raises(UnusableRow, match="no tokens to train") as caught:
        Renderer(tokenizer, max_tokens=200).row(PROMPT, ["Mix it", ""], [False, True])
    assert caught.value.reason == "empty_response"


def test_a_row_is_never_cut(tokenizer: Any) -> None:
    length = len(Renderer(tokenizer, max_tokens=200).row(PROMPT, ["Mix flour."])[0].ids_T)
    assert len(Renderer(tokenizer, max_tokens=length).row(PROMPT, ["Mix flour."])[0].ids_T) == length
    with pytest.raises(UnusableRow, match=f"{length} tokens, the longest allowed is {length - 1}") as caught:
        Renderer(tokenizer, max_tokens=length - 1).row(PROMPT, ["Mix", "Mix flour."])
    assert caught.value.reason == "too_long"


def test_a_marker_inside_a_response_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UnusableRow, match="holds a special token") as caught:
        Renderer(tokenizer, max_tokens=200).row(PROMPT, ["Mix <|im_end|> flour."])
    assert caught.value.reason == "marker_in_response"


def test_the_first_of_two_closing_markers_is_the_stop_token(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\n", "<|im_end|>\n<pad>")
    rendered = Renderer(tokenizer, max_tokens=200).row(PROMPT, ["Mix flour."])[0]
    assert tokenizer.decode(rendered.ids_T[rendered.start :]) == "Mix flour.<|im_end|>"


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(UnusableRow, match="not a prefix") as caught:
        Renderer(tokenizer, max_tokens=200).row(PROMPT, ["Mix flour."])
    assert caught.value.reason == "prompt_not_prefix"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}", "two BOS"), ("<|im_end|>\n", "\n", "without a stop token")],
)
def test_a_broken_template_is_refused_at_once(tokenizer: Any, old: str, new: str, message: str) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    with pytest.raises(ValueError, match=message):
        Renderer(tokenizer, max_tokens=200)
