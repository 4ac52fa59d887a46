"""Chat templates of published families, where TRL ships them as their authors wrote them: what is read, what is trained, one BOS."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from training.render import Renderer, UnusableRow, render_prompt

SHIPPED = Path(trl.__file__).parent / "chat_templates"
PROMPT = [
    {"role": "user", "content": "How do I bake bread?"},
    {"role": "assistant", "content": "Mix flour."},
    {"role": "user", "content": "And then?"},
]
RESPONSES = ["Bake it.", "Let it rise, then bake it for half an hour."]
QWEN = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
LLAMA = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
# These are shipped by nobody who is installed here: written anew, to write what theirs write.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SMOLLM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A template with its markers, and what a conversation is under it: the opening, each turn, what ends an answer."""

    template: str  # its text, or the name of a shipped file
    markers: tuple[str, ...]
    bos: str | None
    eos: str
    opening: str
    user: str
    cue: str
    stop: str
    between: str  # from the stop token to the next turn
    before_answer: str = ""

    @property
    def prompt(self) -> str:
        """The prompt's text, up to and including the cue."""
        first, answer, last = (turn["content"] for turn in PROMPT)
        earlier = self.cue + self.before_answer + answer + self.stop + self.between
        return self.opening + self.user.format(first) + earlier + self.user.format(last) + self.cue


CHATML: dict[str, Any] = {
    "markers": QWEN,
    "user": "<|im_start|>user\n{}<|im_end|>\n",
    "cue": "<|im_start|>assistant\n",
    "stop": "<|im_end|>",
    "between": "\n",
}
TURNS: dict[str, Any] = {
    "markers": GEMMA,
    "bos": "<bos>",
    "eos": "<eos>",
    "opening": "<bos>",
    "user": "<start_of_turn>user\n{}<end_of_turn>\n",
    "cue": "<start_of_turn>model\n",
    "stop": "<end_of_turn>",
    "between": "\n",
}
FAMILIES: dict[str, Family] = {
    "llama3": Family(
        "llama3.jinja", LLAMA, "<|begin_of_text|>", "<|eot_id|>", "<|begin_of_text|>",
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", "",
    ),
    "qwen2.5": Family(
        "qwen2_5.jinja", bos=None, eos="<|im_end|>",
        opening="<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n", **CHATML,
    ),
    "qwen3-instruct": Family("qwen3_instruct_2507.jinja", bos=None, eos="<|im_end|>", opening="", **CHATML),
    "gemma2": Family("gemma.jinja", **TURNS),
    "gemma3": Family("gemma3.jinja", **TURNS),
    "mistral": Family(
        MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>", "<s>", "[INST] {}[/INST]", "", "</s>", "", before_answer=" ",
    ),
    "zephyr": Family(
        ZEPHYR, ("<s>", "</s>"), "<s>", "</s>", "", "<|user|>\n{}</s>\n", "<|assistant|>\n", "</s>", "\n",
    ),
    "smollm2": Family(
        SMOLLM, bos="<|im_start|>", eos="<|im_end|>", opening="<|im_start|>system\nBe helpful.<|im_end|>\n", **CHATML,
    ),
}  # fmt: skip


def make_tokenizer(folder: Path, family: Family) -> Any:
    """Return a tokenizer that knows a family's markers, and writes its BOS before plain text as the family's own does."""
    backend = Tokenizer.from_str(AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str())
    path = SHIPPED / family.template if family.template.endswith(".jinja") else None
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos,
        extra_special_tokens=list(family.markers),
        chat_template=path.read_text() if path else family.template,
        clean_up_tokenization_spaces=False,
    )
    if family.bos and family.bos not in QWEN:
        first = [(family.bos, tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{family.bos} $A", special_tokens=first)
        assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return tokenizer


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_the_response_and_what_ends_it(name: str, tiny_policy: Path) -> None:
    family = FAMILIES[name]
    tokenizer = make_tokenizer(tiny_policy, family)
    rendered = Renderer(tokenizer, max_tokens=600).row(PROMPT, RESPONSES)
    (stop,) = tokenizer.encode(family.stop, add_special_tokens=False)
    for sample, response in zip(rendered, RESPONSES, strict=True):
        assert tokenizer.decode(sample.ids_T[: sample.start]) == family.prompt
        assert tokenizer.decode(sample.ids_T[sample.start :]) == family.before_answer + response + family.stop
        assert sample.ids_T[: sample.start].tolist() == render_prompt(tokenizer, PROMPT)
        assert sample.ids_T[-1] == stop and sample.ids_T[sample.start :].tolist().count(stop) == 1
        assert sample.respaced == bool(family.before_answer)
        opens = family.bos is not None and family.opening.startswith(family.bos)
        assert sample.ids_T[:2].tolist().count(tokenizer.bos_token_id) == opens


@pytest.mark.parametrize("name", FAMILIES)
def test_a_response_that_was_cut_short_trains_no_stop_token_under_any(name: str, tiny_policy: Path) -> None:
    tokenizer = make_tokenizer(tiny_policy, FAMILIES[name])
    whole, cut = Renderer(tokenizer, max_tokens=600).row(PROMPT, RESPONSES[:1] * 2, [False, True])
    assert cut.ids_T.tolist() == whole.ids_T.tolist()[:-1]


def test_the_thinking_templates_own_empty_thought_is_not_trained(tiny_policy: Path) -> None:
    """Qwen 3 writes one into every last answer that has none: refused, unless the answer brings its thought."""
    family = Family("qwen3.jinja", bos=None, eos="<|im_end|>", opening="", **CHATML)
    tokenizer = make_tokenizer(tiny_policy, family)
    renderer = Renderer(tokenizer, max_tokens=600)
    with pytest.raises(UnusableRow, match=r"writes '<think>\\n\\n</think>\\n\\nBake it\.' for the response") as caught:
        renderer.row(PROMPT, RESPONSES)
    assert caught.value.reason == "response_rewritten"
    thought = "<think>\nWarm first.\n</think>\n\nBake it."
    (sample,) = renderer.row(PROMPT, [thought])
    assert tokenizer.decode(sample.ids_T[: sample.start]) == family.prompt
    assert tokenizer.decode(sample.ids_T[sample.start :]) == thought + "<|im_end|>"


def test_a_bos_of_template_and_tokenizer_is_refused(tiny_policy: Path) -> None:
    family = FAMILIES["llama3"]
    tokenizer = make_tokenizer(tiny_policy, family)
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(ValueError, match="begins with two BOS tokens"):
        Renderer(tokenizer, max_tokens=600)


def test_what_a_template_refuses_is_a_row_to_drop(tiny_policy: Path) -> None:
    """Gemma 2 takes no system prompt."""
    tokenizer = make_tokenizer(tiny_policy, FAMILIES["gemma2"])
    with pytest.raises(UnusableRow, match=r"refuses the conversation \(System role not supported\)") as caught:
        Renderer(tokenizer, max_tokens=600).row([{"role": "system", "content": "Be brief."}, *PROMPT], RESPONSES)
    assert caught.value.reason == "template_refuses"
