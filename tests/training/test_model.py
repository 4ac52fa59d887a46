"""A tokenizer's digest says what it does, and not how its files were written or how it was last called; and what a policy is when it was read."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import embedding
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    ByT5Tokenizer,
    GPT2Config,
    RobertaConfig,
    RobertaModel,
)

from tests.ranks import Ranks
from training.config import Precision
from training.distributed import ALONE, World
from training.model import check_context, digest_tokenizer, load_causal_model, load_policy
from training.render import Renderer, UnusableRow
from training.sharding import load_sharded_policy


def test_a_tokenizer_is_the_same_when_saved_again_and_after_use(tiny_policy: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    digest = digest_tokenizer(tokenizer)
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=3)
    assert digest_tokenizer(tokenizer) == digest
    tokenizer.save_pretrained(tmp_path)
    assert digest_tokenizer(AutoTokenizer.from_pretrained(tmp_path)) == digest


def test_another_token_is_another_tokenizer(tiny_policy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    digest = digest_tokenizer(tokenizer)
    tokenizer.add_tokens(["zebra"])
    assert digest_tokenizer(tokenizer) != digest


def test_a_tokenizer_written_in_python_has_a_digest_too() -> None:
    digest = digest_tokenizer(ByT5Tokenizer())
    assert digest == digest_tokenizer(ByT5Tokenizer()) != digest_tokenizer(ByT5Tokenizer(extra_ids=3))


@pytest.mark.parametrize("tied", [False, True])
def test_a_stop_token_that_pads_too_has_its_gradient(tied: bool, tiny_policy: Path, tmp_path: Path) -> None:
    """As where embeddings are looked up by hand; torch's own lookup leaves the row of padding out."""
    model, _ = load_policy(pad_with_stop(tiny_policy, tmp_path / "base", tied=tied), precision=Precision.float32, device=ALONE.device)  # fmt: skip
    stop, weight = model.config.eos_token_id, model.get_input_embeddings().weight
    assert model.config.pad_token_id == stop and (model.get_output_embeddings().weight is weight) == tied
    ids = torch.tensor([[5, 6, stop, 7, 8, stop, 9]])
    found = []
    for inputs in ({"input_ids": ids}, {"inputs_embeds": embedding(ids, weight)}):
        model.zero_grad()
        model(**inputs).logits[0, 3:].log_softmax(-1).sum().backward()
        found.append(weight.grad.clone())
    assert torch.equal(*found) and found[0][stop].abs().max() > 1e-4


def read_padding(world: World, folder: Path) -> Any:
    policy, _ = load_sharded_policy(folder, world, precision=Precision.float32)
    return policy.model.get_input_embeddings().padding_idx


def test_nor_does_a_part_of_an_embedding_leave_it_out(tiny_policy: Path, tmp_path: Path, ranks: Ranks) -> None:
    assert (
        ranks.run(read_padding, size=2, folder=pad_with_stop(tiny_policy, tmp_path / "base", tied=False)) == [None] * 2
    )


def pad_with_stop(base: Path, folder: Path, *, tied: bool) -> Path:
    """Return a copy of a policy whose configuration pads with its stop token."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    changed = {"pad_token_id": config["eos_token_id"], "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config | changed))
    if tied:
        state = load_file(folder / "model.safetensors")
        del state["lm_head.weight"]
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_special_token_that_nothing_writes_needs_no_row_of_the_embedding(tiny_policy: Path, tmp_path: Path) -> None:
    """As that for images in the tokenizer of Gemma 3, whose models of text have none for it. Where a text holds it, the row is refused."""
    folder = shutil.copytree(tiny_policy, tmp_path / "one-more")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(AddedToken("<image>", special=True), special_tokens=True)
    tokenizer.save_pretrained(folder)
    model, tokenizer = load_policy(folder, precision=Precision.float32, device=torch.device("cpu"))
    assert max(tokenizer.get_vocab().values()) == model.get_input_embeddings().num_embeddings
    renderer = Renderer(tokenizer, max_tokens=200)
    for prompt, answer in (("Look: <image>", "No"), ("Look", "An <image>")):
        with pytest.raises(UnusableRow, match="special token"):
            renderer.row([{"role": "user", "content": prompt}], [answer])
    tokenizer.chat_template += "<image>"
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"largest id is \d+, the embedding has \d+ rows; .*of different models"):
        load_policy(folder, precision=Precision.float32, device=torch.device("cpu"))


def test_positions_behind_that_of_padding_are_fewer_than_the_configuration_says() -> None:
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 30,
    }
    roberta = RobertaModel(RobertaConfig(**sizes, max_position_embeddings=66, pad_token_id=1)).eval()
    check_context(roberta, 64)
    assert roberta(input_ids=torch.full((1, 64), 5)).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match="max_tokens: got 65, the model roberta has a context of 64 tokens"):
        check_context(roberta, 65)
    check_context(BertModel(BertConfig(**sizes, max_position_embeddings=66)), 66)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_masks_that_older_programs_stored_are_no_weights_and_layers_are(prefix: str, tmp_path: Path) -> None:
    """GPT-2 as its first files were, with and without the prefix of its trunk."""
    config = GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    state = {prefix + name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    masks = {f"{prefix}h.0.attn.bias": torch.ones(1, 1, 8, 8), f"{prefix}h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(state | masks, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_causal_model(tmp_path).config.n_layer == 2
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"n_layer": 1}))
    with pytest.raises(ValueError, match=rf"hold \d+ tensors .*\(first: {re.escape(prefix)}h\.1\."):
        load_causal_model(tmp_path)
