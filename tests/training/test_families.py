"""Families: separate rows and trees give what stock transformers gives for each row alone, or the family is refused by name.

A wrong number without a word is the worst that can happen here, so each class of model that computes in another way is tried: windows,
caps, scales behind the output head, ALiBi, states along the sequence, positions that depend on the longest row.
"""

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteConfig,
    Lfm2Config,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MiniCPM3Config,
    MiniMaxConfig,
    MixtralConfig,
    MptConfig,
    NanoChatConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    SmolLM3Config,
    VaultGemmaConfig,
)

from tests.architectures import CONFIGS, HEADS, SMALL, VOCABULARY, make_model
from tests.ranks import Ranks
from tests.training.test_logprobs import gradients, plain_logps
from tests.training.test_tree import make_groups
from training import train
from training.config import Layout, LoraConfig, Precision
from training.data.batch import collate, collate_trees, lay_out
from training.distributed import World
from training.job import Job
from training.logprobs import check_head, check_layout, sum_logps
from training.lora import add_adapter
from training.model import load_policy
from training.plan import read_architecture
from training.render import Renderer
from training.sharding import load_sharded_policy
from training.tree import enable_trees

CPU = torch.device("cpu")
GROUPS = make_groups()  # up to 26 tokens: beyond the windows of tests/architectures.py
SAMPLES = [sample for group in GROUPS for sample in group]
GROUP_B = np.repeat(np.arange(len(GROUPS)), [len(group) for group in GROUPS])
WEIGHT_B = torch.tensor([0.3, 2.0, 0.0, 1.7, 0.5, 1.5], dtype=torch.float64)
NAMED = {"vocab_size": VOCABULARY, "hidden_size": 16}
LOUD = {**SMALL, "initializer_range": 1.0}  # logits far enough from 0 for a cap to show


def make(config: Any) -> Any:
    """Return a random model of a config, always the same one, in evaluation mode; its config is its own."""
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    capped = getattr(config, "attn_logit_softcapping", None)  # eager is the one stock attention that caps scores
    return AutoModelForCausalLM.from_config(config, **({"attn_implementation": "eager"} if capped else {})).eval()


def assert_is_stock(build: Callable[[], Any], layout: Layout) -> None:
    """Hold log-probabilities and gradients of a layout to the stock model's of each row alone."""
    stock = build()
    expected = plain_logps(stock, SAMPLES)
    expected_gradients = gradients(stock, (WEIGHT_B * expected).sum())
    model = build()
    check_layout(model, GROUPS, layout=layout, device=CPU)
    got = sum_logps(model, lay_out(SAMPLES, GROUP_B, device=CPU, layout=layout))
    assert (got - expected).abs().max() <= 1e-4
    scale = max(gradient.abs().max() for gradient in expected_gradients)
    gaps = [
        (a - b).abs().max() / scale
        for a, b in zip(gradients(model, (WEIGHT_B * got).sum()), expected_gradients, strict=True)
    ]
    assert scale > 0 and max(gaps) <= 1e-5


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("name", CONFIGS)
def test_the_families_of_the_engine_are_those_of_stock_transformers(name: str, layout: Layout) -> None:
    assert_is_stock(lambda: make_model(name, dtype=torch.float64), layout)


ROPE = {"rope_theta": 10_000.0, "factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [4.0, 8.0]}
OTHERS = {
    "smollm3": SmolLM3Config(
        **SMALL, pad_token_id=0, no_rope_layer_interval=2
    ),  # every second layer knows no positions
    "dynamic RoPE within its length": LlamaConfig(
        **SMALL, max_position_embeddings=32, rope_parameters={**ROPE, "rope_type": "dynamic"}
    ),
    "LongRoPE within its first length": LlamaConfig(
        **SMALL, max_position_embeddings=64, rope_parameters={**ROPE, **LONG, "original_max_position_embeddings": 32}
    ),
    "linear RoPE": LlamaConfig(**SMALL, rope_parameters={**ROPE, "rope_type": "linear"}),
}


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("name", OTHERS)
def test_others_are_those_of_stock_transformers(name: str, layout: Layout) -> None:
    assert_is_stock(lambda: make(OTHERS[name]), layout)


EXPERTS = {  # each token goes through two of four; Mixtral's attention has a window here too
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=6),
    "qwen3_moe": Qwen3MoeConfig(
        **SMALL, **HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, norm_topk_prob=True
    ),
}


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("name", EXPERTS)
def test_mixtures_of_experts_are_those_of_stock_transformers(name: str, layout: Layout) -> None:
    """Values and gradients, of experts that all take part."""
    assert_is_stock(lambda: make(EXPERTS[name]), layout)
    model = make(EXPERTS[name])
    plain_logps(model, SAMPLES).sum().backward()
    experts = [parameter.grad for key, parameter in model.named_parameters() if ".experts." in key]
    assert len(experts) == 2 * 2  # of two layers, the way in and the way out
    assert all(gradient_EOI.abs().amax(dim=(1, 2)).min() > 0 for gradient_EOI in experts)


CAPPED = {
    "gemma2": Gemma2Config(**LOUD, **HEADS, final_logit_softcapping=2.0, attn_logit_softcapping=3.0),
    "gemma3_text": Gemma3TextConfig(**LOUD, **HEADS, final_logit_softcapping=2.0),
    "vaultgemma": VaultGemmaConfig(**LOUD, **HEADS, final_logit_softcapping=2.0, attn_logit_softcapping=None),
    "nanochat": NanoChatConfig(**LOUD, final_logit_softcapping=2.0),
}


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("name", CAPPED)
def test_logits_that_are_capped_behind_the_head_are_those_of_stock_transformers(name: str, layout: Layout) -> None:
    check_head(make(CAPPED[name]))
    assert_is_stock(lambda: make(CAPPED[name]), layout)
    bare = make(CAPPED[name])
    with torch.no_grad():
        expected = plain_logps(bare, SAMPLES)
        bare.config.final_logit_softcapping = None
        assert (plain_logps(bare, SAMPLES) - expected).abs().max() > 1.0  # without the cap it would be another model


SCALED = {
    "cohere": CohereConfig(**LOUD, logit_scale=0.25),
    "cohere2": Cohere2Config(**LOUD, logit_scale=0.25),
    "granite": GraniteConfig(**LOUD, logits_scaling=4.0),
    "minicpm3": MiniCPM3Config(
        **{**LOUD, "num_key_value_heads": 4}, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4,
        v_head_dim=4, dim_model_base=4,
    ),
    "falcon_h1": FalconH1Config(
        **LOUD, mamba_d_ssm=16, mamba_n_heads=4, mamba_d_head=4, mamba_d_state=4, mamba_chunk_size=8,
        lm_head_multiplier=0.25,
    ),
    "recurrent_gemma": RecurrentGemmaConfig(  # capped by a number of another name
        **NAMED, intermediate_size=48, num_attention_heads=2, num_hidden_layers=3, lru_width=16, logits_soft_cap=0.5
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALED)
def test_logits_that_are_scaled_behind_the_head_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"model type {name}: its logits differ by .*scaled.*not supported"):
        check_head(make(SCALED[name]))


ROWS_ALONE = {
    "bloom": BloomConfig(**NAMED, n_layer=2, n_head=4, initializer_range=0.3),  # ALiBi, as the next two
    "mpt": MptConfig(vocab_size=VOCABULARY, d_model=16, n_heads=4, n_layers=2, max_seq_len=64, initializer_range=0.3),
    "falcon": FalconConfig(
        **NAMED, num_hidden_layers=2, num_attention_heads=4, alibi=True, multi_query=False, initializer_range=0.3
    ),
    "gpt_oss": GptOssConfig(**SMALL, **HEADS, num_local_experts=2, num_experts_per_tok=1, sliding_window=6),  # sinks
    "mamba": MambaConfig(**NAMED, state_size=4, num_hidden_layers=2, initializer_range=0.3),
    "lfm2": Lfm2Config(**SMALL, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "minimax": MiniMaxConfig(
        **SMALL, layer_types=["linear_attention", "full_attention"], num_local_experts=2, num_experts_per_tok=1, block_size=8
    ),
    "qwen3_next": Qwen3NextConfig(
        **SMALL, **HEADS, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=4, linear_value_head_dim=4, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=8, shared_expert_intermediate_size=8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS_ALONE)
def test_what_cannot_share_a_prompt_is_refused_by_name_and_runs_as_separate_rows_when_asked(name: str) -> None:
    with pytest.raises(ValueError, match=rf"model type {name}.*set runtime\.layout to rows"):
        check_layout(make(ROWS_ALONE[name]), GROUPS, layout=Layout.tree, device=CPU)
    check_head(make(ROWS_ALONE[name]))
    assert_is_stock(lambda: make(ROWS_ALONE[name]), Layout.rows)


class Llama4(Llama4ForCausalLM):
    """The one family whose layers attend in chunks, with its trunk by the name that it has there."""

    base_model_prefix = "model"


def make_chunked(chunk: int) -> Any:
    """Return a model of a layer that sees no token before its own chunk, and one that sees all."""
    config = Llama4TextConfig(
        **SMALL, **HEADS, intermediate_size_mlp=24, num_local_experts=2, num_experts_per_tok=1, no_rope_layers=[1, 0],
        attention_chunk_size=chunk, pad_token_id=0,
    )  # fmt: skip
    assert config.layer_types == ["chunked_attention", "full_attention"]
    torch.manual_seed(0)
    return Llama4._from_config(config).eval()


def test_chunks_of_attention_are_refused_by_name_and_run_as_separate_rows() -> None:
    """Trees know none, and layers without positions scale queries by their place in the sequence."""
    for chunk in (8, 25):  # of the longest row's 25 tokens that are read
        with pytest.raises(
            ValueError, match=r"llama4_text: its layers \(chunked_attention\) .*set runtime\.layout to rows"
        ):
            check_layout(make_chunked(chunk), GROUPS, layout=Layout.tree, device=CPU)
        assert_is_stock(lambda chunk=chunk: make_chunked(chunk), Layout.rows)


def test_a_model_that_hides_its_trunk_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"model type llama4_text: .*not supported"):
        check_head(make(make_chunked(8).config))


@pytest.mark.parametrize("name", ["mamba", "lfm2", "minimax", "qwen3_next"])
def test_a_state_along_the_sequence_is_named_as_the_reason(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: its layers \(.*\) join tokens by more than attention"):
        enable_trees(make(ROWS_ALONE[name]))


def test_a_model_that_changes_its_weights_as_it_computes_is_refused() -> None:
    """RWKV divides the weights of its later layers once, in evaluation mode: saved and loaded they would be divided again."""
    with pytest.raises(ValueError, match=r"rwkv: a forward pass changes its weights.*not supported"):
        check_head(make(RwkvConfig(**NAMED, num_hidden_layers=2, rescale_every=1)))


def test_trees_for_a_model_that_was_not_made_ready_are_an_error() -> None:
    """Its attention would read all prompts and responses as one long answer, and give numbers."""
    model = make_model("llama")
    micro = collate_trees(SAMPLES, GROUP_B, device=CPU)
    told = re.escape(
        "llama: got a micro-batch of trees for the attention 'sdpa', expected 'varflow_tree'; call check_layout"
    )
    with pytest.raises(ValueError, match=told):
        sum_logps(model, micro)
    enable_trees(model)
    assert (sum_logps(model, micro) - plain_logps(make_model("llama"), SAMPLES)).abs().max() <= 1e-4


@pytest.mark.parametrize("name", EXPERTS)
def test_an_adapter_of_experts_is_refused_before_anything_is_trained(name: str) -> None:
    """PEFT puts it on the tensors that hold all experts, where it can be trained and not taken out again."""
    with pytest.raises(ValueError, match=rf"model type {name}, whose experts are tensors.*set train\.lora\.rank to 0"):
        add_adapter(make(EXPERTS[name]), LoraConfig(rank=2))


def test_experts_on_several_ranks_need_files_of_one_tensor_for_all(
    tiny_policy: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """Files have a tensor for each expert; the refusal names the option with which they are saved as the model has them."""
    base = shutil.copytree(tiny_policy, tmp_path / "experts")
    config = copy.deepcopy(EXPERTS["mixtral"])
    config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id = 512, 0, 1, 2
    model = make(config)
    model.save_pretrained(base)
    with pytest.raises(AssertionError, match=r"tensors of mixtral are not in its files .*save_original_format=False"):
        ranks.run(compare_sharded, size=2, folder=base)
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, save_original_format=False)
    ranks.run(compare_sharded, size=2, folder=base)


def compare_sharded(world: World, folder: Path) -> None:
    """Hold the log-probabilities of a policy on its ranks to those of the whole one."""
    policy, _ = load_sharded_policy(folder, world, precision=Precision.float32)
    micro = collate(SAMPLES, device=CPU)
    with torch.no_grad():
        expected = sum_logps(load_policy(folder, precision=Precision.float32, device=CPU)[0], micro)
        assert (sum_logps(policy, micro) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("name", "config", "layout", "lora"),
    [
        *((name, CONFIGS[name], Layout.tree, 0) for name in ("qwen2", "qwen3", "mistral", "gemma2", "gemma3")),
        ("mixtral", EXPERTS["mixtral"], Layout.tree, 0),
        ("gemma2", CONFIGS["gemma2"], Layout.tree, 2),
        ("bloom", ROWS_ALONE["bloom"], Layout.rows, 0),
        ("mamba", ROWS_ALONE["mamba"], Layout.rows, 0),
        ("qwen3_next", ROWS_ALONE["qwen3_next"], Layout.rows, 0),
    ],
)
def test_the_model_that_a_job_writes_is_the_one_it_trained(
    name: str,
    config: Any,
    layout: Layout,
    lora: int,
    tiny_policy: Path,
    tmp_path: Path,
    make_job: Callable[..., Job],
    make_row: Any,
    write_rows: Any,
) -> None:
    """Preflight, steps, answers on the way and export; stock transformers finds the last held-out loss in what was written."""
    base = shutil.copytree(tiny_policy, tmp_path / name)
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = copy.deepcopy(config)
    config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id = (
        len(tokenizer) + 1,
        0,
        1,
        2,
    )  # Qwen 2's class adds one
    make(config).save_pretrained(base)
    made = [
        make_row(f"Question {i}?", [f"Answer {'very ' * i}", "No"], split="heldout" if i > 3 else "train")
        for i in range(6)
    ]
    rows = write_rows(tmp_path / "rows", made)
    settings = {
        "objective": "sft", "responses": "all", "batch_prompts": 2, "max_tokens": 128, "epochs": 3, "learning_rate": 3e-2, "lora": {"rank": lora},
    }  # fmt: skip
    job = make_job(
        "train", "job", config=settings, inputs={"rows": rows, "base": base}, layout=layout, heldout_every_steps=1
    )
    train.run(job)
    assert json.loads((job.output / "preflight.json").read_text())["passed"]
    answers = [json.loads(line) for line in (job.output / "answers.jsonl").read_text().splitlines()]
    assert [answer["step"] for answer in answers] == [0, 0, 6, 6]
    heldout = [row for row in pq.read_table(rows / "rows.parquet").to_pylist() if row["split"] == "heldout"]
    renderer = Renderer(AutoTokenizer.from_pretrained(base), max_tokens=128)  # Qwen 2's class cuts text otherwise
    samples = [sample for row in heldout for sample in renderer.row(row["prompt"], row["responses"])]
    with torch.no_grad():
        logp_R = plain_logps(AutoModelForCausalLM.from_pretrained(job.output).eval(), samples)
    lines = [json.loads(line) for line in (job.output / "metrics.jsonl").read_text().splitlines()]
    mean_tokens = json.loads((job.output / "summary.json").read_text())["mean_trained_tokens"]
    assert lines[-1]["heldout/loss"] == pytest.approx(-logp_R.sum().item() / (4 * mean_tokens), rel=1e-4)
    assert lines[-1]["heldout/loss"] != pytest.approx(lines[0]["heldout/loss"], rel=1e-3)


def test_a_model_of_images_too_is_refused_and_the_one_of_text_within_it_is_saved_as_the_documents_say(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    text = {**SMALL, **HEADS, "vocab_size": len(tokenizer), "sliding_window": 6}
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config=vision))
    folder = tmp_path / "gemma-3-4b-it"
    for part in (whole, tokenizer):
        part.save_pretrained(folder)
    told = "model type gemma3 reads more than text; expected a language model alone"
    with pytest.raises(ValueError, match=told):
        load_policy(folder, precision=Precision.float32, device=CPU)
    with pytest.raises(ValueError, match=told):
        read_architecture(folder)

    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    exec(page.split("```python\n")[1].split("```")[0], {})
    model, _ = load_policy(tmp_path / "gemma-3-4b-it-text", precision=Precision.float32, device=CPU)
    check_head(model)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, whole.eval()(ids).logits, rtol=0, atol=1e-5)
