"""Rendering: prompt ids are a true prefix, the response and its stop token are trained, the rest is refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

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


@pytest.mark.parametrize(
    ("today", "written"),
    [
        ("{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }} ", "26 Jul 2024 "),
        ("{% set today = strftime_now('%d %B %Y') %}{{ today }} ", "26 July 2024 "),
    ],
    ids=["Llama 3", "SmolLM3"],
)  # fmt: skip
def test_a_template_that_writes_the_date_writes_the_same_every_day(tokenizer: Any, today: str, written: str) -> None:
    """As these models' do, whose lines these are in short. Stored log-probabilities are of these prompts, and training may be tomorrow."""
    tokenizer.chat_template = today + tokenizer.chat_template
    assert tokenizer.decode(render_prompt(tokenizer, PROMPT)).startswith(written)
    row = Renderer(tokenizer, max_tokens=200).row(PROMPT, ["Mix flour."])[0]
    assert tokenizer.decode(row.ids_T).startswith(written)


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


def test_white_space_that_the_template_writes_behind_is_not_trained_where_the_answer_was_cut(tokenizer: Any) -> None:
    """As Llama 2's does. What the author wrote last stays, white space too."""
    use_template(tokenizer, "{{ content }} ")
    for response, expected in (("Mix fl", "Mix fl"), ("Mix ", "Mix "), ("x", "x")):
        whole, cut = Renderer(tokenizer, max_tokens=200).row(PROMPT, [response, response], [False, True])
        assert tokenizer.decode(whole.ids_T[whole.start :]) == f"{response} <|im_end|>" and whole.respaced
        assert tokenizer.decode(cut.ids_T[cut.start :]) == expected
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


@pytest.mark.parametrize("role", ["system", "user"])
def test_a_marker_inside_a_prompt_is_refused(role: str, tokenizer: Any) -> None:
    """Read as a token it would end the turn: the policy would be asked something else than the row says."""
    prompt = [{"role": role, "content": "What does <|im_end|> mean?"}, *PROMPT]
    with pytest.raises(UnusableRow, match=rf"the {role}'s turn holds '<\|im_end\|>', a special token") as caught:
        Renderer(tokenizer, max_tokens=200).row(prompt, ["It ends a turn."])
    assert caught.value.reason == "marker_in_prompt"


def test_the_first_of_two_closing_markers_is_the_stop_token(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\n", "<|im_end|>\n<pad>")
    rendered = Renderer(tokenizer, max_tokens=200).row(PROMPT, ["Mix flour."])[0]
    assert tokenizer.decode(rendered.ids_T[rendered.start :]) == "Mix flour.<|im_end|>"


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(UnusableRow, match="not a prefix") as caught:
        Renderer(tokenizer, max_tokens=200).row(PROMPT, ["Mix flour."])
    assert caught.value.reason == "prompt_not_prefix"


def use_template(tokenizer: Any, last_turn: str) -> None:
    """Give the tokenizer a ChatML template that writes the conversation's last assistant turn its own way."""
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{% set content = message.content %}"
        "{{ '<|im_start|>' + message.role + '\n' }}"
        "{% if message.role == 'assistant' and loop.last %}" + last_turn + "{% else %}{{ content }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


# As Qwen 3 does it: thoughts are taken apart from the answer and written again, an empty block where there were none.
THINKING = (
    "{% set thought = '' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' + content }}"
)


@pytest.mark.parametrize(("response", "cut_short"), [("Mix flour.", False), ("<think>\nWhat is br", True)])
def test_what_the_template_alone_wrote_is_not_trained(tokenizer: Any, response: str, cut_short: bool) -> None:
    use_template(tokenizer, THINKING)
    words = r"writes '<think>\\n\\n</think>\\n\\n.*for the response '(Mix flour|<think>\\nWhat)"
    with pytest.raises(UnusableRow, match=words) as caught:
        Renderer(tokenizer, max_tokens=400).row(PROMPT, [response], [cut_short])
    assert caught.value.reason == "response_rewritten"


def test_a_response_that_the_template_writes_as_it_is_is_trained_under_it(tokenizer: Any) -> None:
    use_template(tokenizer, THINKING)
    response = "<think>\nWhat is bread?\n</think>\n\nMix flour."
    (rendered,) = Renderer(tokenizer, max_tokens=400).row(PROMPT, [response])
    assert tokenizer.decode(rendered.ids_T[rendered.start :]) == response + "<|im_end|>"
    # the way out that the refusal names: the empty block stands in the cue
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "assistant\n' }}", "assistant\n<think>\n\n</think>\n\n' }}"
    )
    (rendered,) = Renderer(tokenizer, max_tokens=400).row(PROMPT, ["Mix flour."])
    assert tokenizer.decode(rendered.ids_T[rendered.start :]) == "Mix flour.<|im_end|>"


@pytest.mark.parametrize("last_turn", ["{{ content | trim }}", "{{ ' ' + content | trim + ' ' }}"])  # Llama 3, Llama 2
def test_white_space_at_the_ends_is_the_templates_and_counted(tokenizer: Any, last_turn: str) -> None:
    use_template(tokenizer, last_turn)
    rows = Renderer(tokenizer, max_tokens=400).row(PROMPT, ["  Mix  flour. \n", "Mix  flour."])
    assert [rendered.respaced for rendered in rows] == [True, last_turn.startswith("{{ ' '")]
    assert [tokenizer.decode(r.ids_T[r.start : -1]).strip() for r in rows] == ["Mix  flour."] * 2
    use_template(tokenizer, "{{ content | upper }}")
    with pytest.raises(UnusableRow, match="writes 'MIX' for the response 'Mix'"):
        Renderer(tokenizer, max_tokens=400).row(PROMPT, ["Mix"])


def test_a_template_that_leaves_an_answer_open_is_named(tokenizer: Any) -> None:
    """It ends the short answer of the template's own trial, and not every other."""
    whole = tokenizer.chat_template
    tokenizer.chat_template = whole.replace("<|im_end|>", "{% if message.content | length < 30 %}<|im_end|>{% endif %}")
    renderer = Renderer(tokenizer, max_tokens=400)
    assert renderer.row(PROMPT, ["Mix flour."])[0].ids_T[-1] == tokenizer.eos_token_id
    words = r"writes 0 special tokens after the response 'Mix flour.*', 1 after others.*take a template that ends every"
    with pytest.raises(UnusableRow, match=words) as caught:
        renderer.row(PROMPT, ["Mix flour, water, salt and yeast, and bake it."])
    assert caught.value.reason == "no_stop_token"


def test_what_was_sampled_here_is_trained_token_by_token(tokenizer: Any) -> None:
    """Special tokens, half a character, two tokens where the tokenizer would write one: no text gives them back."""
    (token,) = tokenizer.encode("is", add_special_tokens=False)
    pair = tokenizer.convert_tokens_to_ids(["i", "s"])
    half = tokenizer.encode("\u20ac", add_special_tokens=False)[:1]
    eos, other = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_start|>")
    drawn = [[*pair, eos], [token, other, token, eos], [token, *half]]
    texts = tokenizer.batch_decode(drawn, skip_special_tokens=True)
    row = {"prompt": PROMPT, "responses": texts, "truncated": [False, False, True], "response_ids": drawn}
    renderer = Renderer(tokenizer, max_tokens=200)
    rendered = renderer.stored(row)
    assert [sample.ids_T[sample.start :].tolist() for sample in rendered] == drawn
    assert all(sample.ids_T[: sample.start].tolist() == render_prompt(tokenizer, PROMPT) for sample in rendered)
    assert [s.ids_T.tolist() for s in renderer.stored(row, [2, 0])] == [rendered[k].ids_T.tolist() for k in (2, 0)]
    again = renderer.row(PROMPT, texts, row["truncated"])
    assert not any(np.array_equal(a.ids_T, b.ids_T) for a, b in zip(rendered, again, strict=True))
    longest = max(len(sample.ids_T) for sample in rendered)
    with pytest.raises(UnusableRow, match=f"{longest} tokens, the longest allowed is {longest - 1}"):
        Renderer(tokenizer, max_tokens=longest - 1).stored(row)


def test_a_tokenizer_that_composes_accents_gives_back_another_text_and_is_no_rewriting(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    (rendered,) = Renderer(tokenizer, max_tokens=400).row(PROMPT, ["Cafe\u0301"])
    assert tokenizer.decode(rendered.ids_T[rendered.start : -1]) == "Caf\u00e9" and not rendered.respaced


def test_a_tokenizer_with_word_marks_reads_the_response_as_its_own(tmp_path: Path) -> None:
    """SentencePiece's marks before words: in a conversation the first word carries one, and its decoder takes it off."""
    words = [
        "<s>",
        "</s>",
        "<unk>",
        *(f"\u2581{word}" for word in ("a", "b", "user", "bot", "Mix", "flour", ",", "How")),
        "\u2581",
    ]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=True,
    )
    tokenizer.chat_template = (
        "<s>{% for m in messages %}{% if m.role == 'user' %}user {{ m.content }} bot{% else %} {{ m.content }}</s>{% endif %}"
        "{% endfor %}"
    )
    (rendered,) = Renderer(tokenizer, max_tokens=20).row([{"role": "user", "content": "How"}], ["Mix , flour"])
    assert tokenizer.convert_ids_to_tokens(rendered.ids_T[rendered.start :].tolist()) == [
        "\u2581Mix", "\u2581,", "\u2581flour", "</s>",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}", "two BOS"), ("<|im_end|>\n", "\n", "without a stop token")],
)
def test_a_broken_template_is_refused_at_once(tokenizer: Any, old: str, new: str, message: str) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    with pytest.raises(ValueError, match=message):
        Renderer(tokenizer, max_tokens=200)
