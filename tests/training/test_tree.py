"""Trees: prompts shared, sequences packed, and every log-probability that of a separate row."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig

from tests.architectures import CONFIGS, SMALL, make_model
from training import tree as tree_module
from training.config import Layout
from training.data.batch import collate, collate_trees, cut_trees
from training.flops import read_windows
from training.logprobs import LayoutError, Policy, check_layout, sum_logps
from training.model import checkpoint_activations, find_layers
from training.render import Rendered
from training.tree import (
    WIDE_KERNEL,
    Tree,
    attend_blocks,
    attend_segments,
    choose_kernel,
    enable_trees,
    tune_kernels,
)

CPU = torch.device("cpu")


def make_group(rng: np.random.Generator, prompt: int, *responses: int) -> list[Rendered]:
    ids = rng.integers(0, 61, size=prompt)
    return [
        Rendered(ids_T=np.r_[ids, rng.integers(0, 61, size=size)].astype(np.int32), start=prompt) for size in responses
    ]


def make_groups() -> list[list[Rendered]]:
    rng = np.random.default_rng(0)
    return [make_group(rng, 9, 4, 11, 1), make_group(rng, 1, 3), make_group(rng, 14, 2, 12)]


def test_a_tree_cell_by_cell() -> None:
    first = [
        Rendered(ids_T=np.array([5, 6, 7], dtype=np.int32), start=2),
        Rendered(ids_T=np.array([5, 6, 8, 9], dtype=np.int32), start=2),
    ]
    second = Rendered(ids_T=np.array([1, 2, 3], dtype=np.int32), start=1)
    micro = collate_trees([*first, second], np.array([4, 4, 7]), device=CPU)
    assert micro.ids_BT.tolist() == [[5, 6, 7, 8, 9, 1, 2, 3]]
    assert micro.position_BT is not None and micro.position_BT.tolist() == [[0, 1, 2, 2, 3, 0, 1, 2]]
    assert micro.target_P.tolist() == [7, 8, 9, 2, 3]
    assert micro.predictor_P.tolist() == [1, 1, 3, 5, 6]  # token 6 predicts the first token of both its responses
    assert (micro.trained, micro.num_tokens) == ((1, 2, 2), 8)
    assert micro.tree is not None and micro.tree.lengths == ((2, 1, 2), (1, 2))


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probabilities_are_those_of_separate_rows(name: str) -> None:
    model, groups = make_model(name), make_groups()
    samples = [sample for group in groups for sample in group]
    group_B = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    with torch.no_grad():
        expected = torch.cat([sum_logps(model, collate([sample], device=CPU)) for sample in samples])
        check_layout(model, groups, layout=Layout.tree, device=CPU)
        got = sum_logps(model, collate_trees(samples, group_B, device=CPU))
    assert torch.allclose(got, expected, rtol=0, atol=1e-4)


def test_a_model_with_its_own_attention_is_refused_by_name() -> None:
    torch.manual_seed(0)
    alibi = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=61, hidden_size=16, n_layer=2, n_head=4)).eval()
    with pytest.raises(ValueError, match=r"bloom.*runtime.layout to rows"):
        check_layout(alibi, make_groups(), layout=Layout.tree, device=CPU)


@pytest.mark.parametrize(
    ("layout", "remedy"), [(Layout.tree, "runtime.layout to rows"), (Layout.rows, "lower max_tokens")]
)
def test_positions_that_depend_on_the_length_are_refused_by_name(layout: Layout, remedy: str) -> None:
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    config = LlamaConfig(**SMALL, max_position_embeddings=8, rope_parameters=rope)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match=rf"llama.*nats per token.*{remedy}"):
        check_layout(model, make_groups(), layout=layout, device=CPU)


@pytest.mark.parametrize("layout", list(Layout))
def test_a_short_row_shows_positions_that_are_switched_by_the_longest(layout: Layout) -> None:
    """LongRoPE: beyond eight positions all rows have other frequencies, so long rows agree among themselves."""
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope", "rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": 8,
        "short_factor": [1.0, 1.0], "long_factor": [4.0, 8.0],
    }  # fmt: skip
    config = LlamaConfig(**SMALL, max_position_embeddings=64, rope_parameters=rope)
    rng = np.random.default_rng(0)
    long = [make_group(rng, 14, 9, 12), make_group(rng, 15, 7)]
    check_layout(AutoModelForCausalLM.from_config(config).eval(), long, layout=layout, device=CPU)
    with pytest.raises(LayoutError, match=r"llama.*nats per token") as caught:
        model = AutoModelForCausalLM.from_config(config).eval()
        check_layout(model, [*long, make_group(rng, 3, 4)], layout=layout, device=CPU)
    assert caught.value.groups == [2], "the short one alone"


def test_kernels_are_tuned_for_hopper_alone_and_for_what_they_have_room_for() -> None:
    tuned = {"fwd_BLOCK_M": 64}
    for dtype, size, given, expected in (
        (torch.bfloat16, 64, tuned, tuned), (torch.float32, 64, tuned, WIDE_KERNEL), (torch.float64, 64, tuned, {}),
        (torch.bfloat16, 256, tuned, {}), (torch.float32, 256, tuned, {}), (torch.float32, 64, {}, {}),
    ):  # fmt: skip
        assert choose_kernel(torch.zeros(1, 1, 1, size, dtype=dtype), given) == {"BACKEND": "TRITON"} | expected
    assert tune_kernels(CPU) == {}


class OneOff(Policy):
    """A policy whose trees give one token 5 nats too much, under bfloat16 autocast alone."""

    def forward(self, compute: Any, *arguments: Any) -> Any:
        out = super().forward(compute, *arguments)
        if arguments and getattr(arguments[0], "tree", None) is not None and torch.is_autocast_enabled("cpu"):
            out[3] += 5.0
        return out


def test_one_token_that_is_far_off_in_bfloat16_is_refused_though_the_mean_is_within_its_bound() -> None:
    groups = make_groups() * 10  # 330 tokens
    for narrow in (False, True):
        check_layout(make_model("llama"), groups, layout=Layout.tree, device=CPU, narrow=narrow)
    check_layout(OneOff(make_model("llama")), groups, layout=Layout.tree, device=CPU)
    with pytest.raises(ValueError, match=r"llama, layout tree, bfloat16: .* one token by \d+.*at most 0.03 and 0.9"):
        check_layout(OneOff(make_model("llama")), groups, layout=Layout.tree, device=CPU, narrow=True)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_one_masked_call_equals_segment_by_segment(window: int | None, softcap: float | None) -> None:
    """FlexAttention's mask, uncompiled on a CPU, against segments: the GPU's path with the CPU's numbers."""
    tree = Tree(lengths=((9, 4, 11, 1), (1, 3), (14, 2, 12)), device=CPU)
    torch.manual_seed(0)
    query = torch.randn(1, 4, sum(tree.segments), 16)
    key, value = torch.randn(2, 1, 2, sum(tree.segments), 16)
    got = attend_blocks(query, key, value, tree.block_mask(window), {}, softcap=softcap, scaling=0.25)
    wide = (tensor.repeat_interleave(2, dim=1) for tensor in (key, value))
    expected = attend_segments(query, *wide, tree, window=window, softcap=softcap, scaling=0.25)
    assert torch.allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 0, 1, 5, 200])
def test_blocks_are_those_that_torch_finds_in_the_whole_mask(window: int | None) -> None:
    """All lists of blocks, of keys by queries and back, in part and whole, and what is seen within: by the definition, token by token."""
    rng = np.random.default_rng(0)
    trees = [
        tuple((int(rng.integers(400)), *rng.integers(1, 300, size=n + 1).tolist()) for n in range(4)) for _ in range(4)
    ]
    for lengths in [((9, 4, 11), (140, 12)), ((0, 3), (128, 128, 256, 1)), *trees]:
        tree = Tree(lengths=lengths, device=CPU)
        got, T = tree.block_mask(window), sum(tree.segments)
        q, k = torch.arange(T)[:, None], torch.arange(T)[None, :]
        assert torch.equal(got.mask_mod(None, None, q, k), torch.from_numpy(see(tree, window)))
        expected = create_block_mask(got.mask_mod, None, None, T, T, device="cpu")
        lists = {name: values for name, values in vars(expected).items() if isinstance(values, torch.Tensor)}
        assert len(lists) == 8 and got.BLOCK_SIZE == expected.BLOCK_SIZE and got.seq_lengths == expected.seq_lengths
        for name, values in lists.items():
            assert torch.equal(getattr(got, name), values) and getattr(got, name).stride() == values.stride()


def see(tree: Tree, window: int | None) -> np.ndarray:
    """Return [T, T], whether a token sees another: of its prompt or itself, no later one, none beyond the window."""
    group_T = np.repeat(np.arange(len(tree.lengths)), [sum(group) for group in tree.lengths])
    segment_T = np.repeat(np.arange(len(tree.segments)), tree.segments)
    prompt_T = np.repeat([place == 0 for group in tree.lengths for place in range(len(group))], tree.segments)
    distance = tree.positions()[:, None] - tree.positions()
    same = (group_T[:, None] == group_T) & (prompt_T | (segment_T[:, None] == segment_T))
    return same & (distance >= 0) & (distance < (window or np.inf))


def make_mixed() -> Any:
    """Return a model that has a layer with a window and one without."""
    config = copy.deepcopy(CONFIGS["gemma3"])
    config.layer_types = ["sliding_attention", "full_attention"]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("name", "narrow", "checkpointing"),
    [("llama", False, False), ("mistral", True, True), ("mixed", False, True), ("mixed", True, False)],
)
def test_compiled_layers_hold_the_masked_call_once_for_all_trees(
    name: str, narrow: bool, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with the gradients of segments: traced and differentiated as there, but run operation by operation, since FlexAttention
    makes no code for a CPU's gradients, nor takes it without being asked twice."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *_: None)
    rng = np.random.default_rng(0)
    apart, within = (make_mixed() if name == "mixed" else make_model(name) for _ in range(2))
    for model in (apart, within):
        enable_trees(model)
    torch.compiler.reset()
    for layer in find_layers(within):
        layer.forward = torch.compile(layer.forward, dynamic=True, backend="aot_eager")
    if checkpointing:
        checkpoint_activations(within)
    made: list[int] = []
    # At first no size but the number of blocks is 6: torch takes sizes that are equal for one.
    for count, responses in ((6, 2), (5, 4), (20, 2)):
        groups = [
            make_group(rng, int(rng.integers(40, 90)), *rng.integers(2, 60, size=responses)) for _ in range(count)
        ]
        samples = [sample for group in groups for sample in group]
        group_B = np.repeat(np.arange(count), responses)
        gradients = []
        for model in (apart, within):
            micro = collate_trees(samples, group_B, device=CPU)
            if model is within:
                micro.tree.make_block_masks(read_windows(model.config))
            model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
                sum_logps(model, micro).sum().backward()
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        gap = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
        assert gap < (3e-2 if narrow else 1e-5)
        made.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert made[0] == made[1] == made[2] and not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize(("window", "softcap", "made"), [(None, None, 6), (5, None, 9), (None, 1.5, 9)])
def test_masks_are_made_once_for_all_layers(
    window: int | None, softcap: float | None, made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine segments: six responses, and three prompts that need a mask where there is a window or a cap."""
    calls: list[int] = []
    real = tree_module.causal_mask
    monkeypatch.setattr(tree_module, "causal_mask", lambda *arguments: calls.append(1) or real(*arguments))
    tree = Tree(lengths=((9, 4, 11, 1), (1, 3), (14, 2, 12)), device=CPU)
    query = torch.randn(1, 4, sum(tree.segments), 16)
    first, *others = (
        attend_segments(query, query, query, tree, window=window, softcap=softcap, scaling=0.25) for _ in range(3)
    )
    assert len(calls) == made and all(torch.equal(first, other) for other in others)


def test_cut_keeps_the_budget_and_every_response() -> None:
    rng = np.random.default_rng(1)
    groups = [make_group(rng, int(p), *rng.integers(1, 30, size=3)) for p in rng.integers(1, 60, size=40)]
    samples = [sample for group in groups for sample in group]
    group_R = np.repeat(np.arange(40), 3)
    batches = cut_trees(samples, group_R, budget=128, whole_groups=False)
    assert sorted(index for batch in batches for index in batch) == list(range(120))
    sizes = [collate_trees([samples[i] for i in batch], group_R[batch], device=CPU).num_tokens for batch in batches]
    assert max(sizes) <= 128
    assert sum(sizes) / (128 * len(sizes)) > 0.85
    whole = cut_trees(samples, group_R, budget=16, whole_groups=True)
    assert all(len(set(group_R[batch])) == 1 for batch in whole) and len(whole) == 40


def test_a_group_above_the_budget_repeats_its_prompt() -> None:
    samples = make_group(np.random.default_rng(0), 10, 5, 5, 5, 40)
    assert cut_trees(samples, np.zeros(4, dtype=int), budget=20, whole_groups=False) == [[3], [0, 1], [2]]


@pytest.mark.parametrize("name", CONFIGS)
def test_plain_calls_are_as_before_when_trees_are_enabled(name: str) -> None:
    """Rows, rows padded on the left, and answers token by token from a cache: as for samples and held-out rows while training."""
    model = make_model(name)
    ids = torch.arange(40).view(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0

    def call() -> list[torch.Tensor]:
        padded = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        answers = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, output_scores=True,
                                 return_dict_in_generate=True, eos_token_id=None, pad_token_id=0).scores  # fmt: skip
        return [model(input_ids=ids).logits, padded[mask.bool()], torch.stack(answers)]

    with torch.no_grad():
        expected = call()
        enable_trees(model)
        for a, b in zip(call(), expected, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-4)
