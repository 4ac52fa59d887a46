"""A tokenizer's digest says what it does, and not how its files were written or how it was last called; and what a policy is when it was read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import embedding
from transformers import AutoTokenizer, ByT5Tokenizer

from tests.ranks import Ranks
from training.config import Precision
from training.distributed import ALONE, World
from training.model import digest_tokenizer, load_policy
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
