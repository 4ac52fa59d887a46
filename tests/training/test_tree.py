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
from training.data import batch as batch_module
from training.data.batch import collate, collate_trees, count_tokens, cut_trees
from training.data.stems import find_stems
from training.flops import read_windows
from training.logprobs import LayoutError, Policy, check_layout, sum_logps
from training.model import checkpoint_activations, find_layers
from training.render import Rendered
from training.train import PolicyForward
from training.tree import (
    HOPPER_KERNELS,
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


def make_tree(*groups: tuple[int, ...], stem: int = 0) -> Tree:
    """Return a tree of prompts with their responses, by their tokens; all of them behind a stem where there is one."""
    lengths, parents = ([stem], [-1]) if stem else ([], [])
    for prompt, *responses in groups:
        parents += [0 if stem else -1, *[len(lengths)] * len(responses)]
        lengths += [prompt, *responses]
    return Tree(lengths=tuple(lengths), parents=tuple(parents), device=CPU)


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
    # the last token of a response predicts nothing, and is not read: the first one's is all that it has
    assert micro.ids_BT.tolist() == [[5, 6, 8, 1, 2]]
    assert micro.position_BT is not None and micro.position_BT.tolist() == [[0, 1, 2, 0, 1]]
    assert micro.target_P.tolist() == [7, 8, 9, 2, 3]
    assert micro.predictor_P.tolist() == [1, 1, 2, 3, 4]  # token 6 predicts the first token of both its responses
    assert (micro.trained, micro.num_tokens) == ((1, 2, 2), 5)
    assert micro.tree is not None and micro.tree.lengths == (2, 1, 1, 1) and micro.tree.parents == (-1, 0, -1, 2)


def test_what_prompts_share_is_laid_once_cell_by_cell() -> None:
    """A system prompt 5 6, of which one prompt is all, and one that goes on from another's; each token is predicted by what came before it."""
    prompts = [[5, 6, 7], [1], [5, 6], [5, 6, 7, 8]]
    responses = [[[3], [4, 4]], [[3, 9]], [[7, 2]], [[1]]]
    samples = [
        Rendered(ids_T=np.array(prompt + response, dtype=np.int32), start=len(prompt))
        for prompt, group in zip(prompts, responses, strict=True)
        for response in group
    ]
    group_B = np.array([0, 0, 1, 2, 3])
    micro = collate_trees(samples, group_B, device=CPU)
    assert micro.ids_BT.tolist() == [[5, 6, 7, 7, 4, 8, 1, 3]]
    assert micro.position_BT is not None
    assert micro.position_BT.tolist() == [[0, 1, 2, 2, 3, 3, 0, 1]]
    assert micro.tree is not None and micro.tree.lengths == (2, 1, 1, 1, 1, 1, 1)
    assert micro.tree.parents == (-1, 0, 0, 2, 2, -1, 5)
    assert micro.target_P.tolist() == [3, 4, 4, 3, 9, 7, 2, 1]
    assert micro.predictor_P.tolist() == [3, 3, 4, 6, 7, 1, 2, 5]
    assert (micro.trained, micro.num_tokens) == ((1, 2, 2, 2, 1), 8)
    assert count_tokens(samples, group_B, layout=Layout.tree) == 8


def test_a_stem_is_shared_where_it_saves_a_32nd_of_what_hangs_on_it() -> None:
    system = np.arange(10)
    prompts = [np.r_[system, 20 + n] for n in range(3)]  # 20 tokens saved
    for tokens, shared in ((637, True), (638, False)):  # with the three last tokens 640 and 641
        stems = find_stems(prompts, [tokens, 0, 0])
        assert [(stem.begin, stem.end) for stem in stems] == ([(0, 10)] if shared else []) + [(10 * shared, 11)] * 3


def test_prompts_with_one_of_two_system_prompts_share_theirs_and_others_keep_their_order() -> None:
    rng = np.random.default_rng(0)
    first, second = np.r_[7, rng.integers(0, 60, size=40)], np.r_[7, 60, rng.integers(0, 60, size=40)]
    own = [rng.integers(0, 60, size=size) for size in (5, 9, 3, 8, 6)]
    prompts = [np.r_[first, own[0]], own[1], np.r_[second, own[2]], np.r_[first, own[3]], np.r_[second, own[4]]]
    stems = find_stems(prompts, [30] * 5)
    assert [(stem.parent, stem.begin, stem.end, stem.ending) for stem in stems] == [
        (None, 0, 41, ()), (0, 41, 46, (0,)), (0, 41, 49, (3,)),
        (None, 0, 9, (1,)),
        (None, 0, 42, ()), (4, 42, 45, (2,)), (4, 42, 48, (4,)),
    ]  # fmt: skip


def make_alike(rng: np.random.Generator) -> tuple[list[Rendered], np.ndarray]:
    """Return samples of prompts that share one of two beginnings, or one that an earlier prompt went on from, or are equal."""
    begun = [rng.integers(0, 61, size=size) for size in rng.integers(1, 12, size=2)]
    samples, group_B = [], []
    for group in range(int(rng.integers(2, 7))):
        prompt = np.r_[begun[rng.integers(len(begun))], rng.integers(0, 61, size=rng.integers(0, 9))]
        begun.append(prompt)
        for size in rng.integers(1, 25, size=rng.integers(1, 4)):
            ids_T = np.r_[prompt, rng.integers(0, 61, size=size)].astype(np.int32)
            samples.append(Rendered(ids_T=ids_T, start=len(prompt)))
            group_B.append(group)
    return samples, np.array(group_B)


@pytest.mark.parametrize("name", CONFIGS)
def test_prompts_that_begin_alike_give_the_values_and_gradients_of_separate_rows(name: str) -> None:
    model, rng = make_model(name), np.random.default_rng(0)
    enable_trees(model)
    saved = 0
    for _ in range(6):
        samples, group_B = make_alike(rng)
        micro = collate_trees(samples, group_B, device=CPU)
        assert micro.num_tokens == count_tokens(samples, group_B, layout=Layout.tree)
        prompts = {int(group): sample.start for group, sample in zip(group_B, samples, strict=True)}
        saved += sum(prompts.values()) + sum(sample.num_trained - 1 for sample in samples) - micro.num_tokens
        weight_B = torch.from_numpy(rng.normal(size=len(samples)))
        found = []
        for batches in ([micro], [collate([sample], device=CPU) for sample in samples]):
            model.zero_grad()
            logp_B = torch.cat([sum_logps(model, batch) for batch in batches])
            (logp_B * weight_B).sum().backward()
            found.append(
                (logp_B.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
            )
        (got, gradient), (expected, expected_gradient) = found
        assert torch.allclose(got, expected, rtol=0, atol=1e-4)
        assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()
    assert saved > 0


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


@pytest.mark.parametrize(
    ("capability", "hip", "expected"), [((9, 0), None, HOPPER_KERNELS), ((8, 0), None, {}), ((9, 4), "6.4", {})]
)
def test_an_amd_of_capability_nine_is_no_hopper(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, expected: dict[str, Any]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert tune_kernels.__wrapped__(torch.device("cuda")) == expected


def test_a_gpus_masks_are_made_where_a_micro_batch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is while the device works on the one before; where it runs, the device would wait for them."""
    monkeypatch.setattr(tree_module, "send", lambda values, device: torch.from_numpy(values))
    monkeypatch.setattr(batch_module, "send", lambda values, device: torch.from_numpy(values))
    monkeypatch.setattr(tree_module, "tune_kernels", lambda device: {})
    device, samples = torch.device("cuda"), make_group(np.random.default_rng(0), 5, 3, 4)
    forward = PolicyForward(device, Layout.tree, windows=[None, 4, 4])
    micro = forward.load(samples, np.zeros(2, dtype=int))
    assert set(micro.tree.block_masks) == {None, 4}
    assert PolicyForward(device, Layout.rows, windows=[None]).load(samples, np.zeros(2, dtype=int)).tree is None


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
@pytest.mark.parametrize("stem", [0, 3])
def test_one_masked_call_equals_segment_by_segment(window: int | None, softcap: float | None, stem: int) -> None:
    """FlexAttention's mask, uncompiled on a CPU, against segments: the GPU's path with the CPU's numbers."""
    tree = make_tree((9, 4, 11, 1), (1, 3), (14, 2, 12), stem=stem)
    torch.manual_seed(0)
    query = torch.randn(1, 4, sum(tree.lengths), 16)
    key, value = torch.randn(2, 1, 2, sum(tree.lengths), 16)
    got = attend_blocks(query, key, value, tree.block_mask(window), {}, softcap=softcap, scaling=0.25)
    wide = (tensor.repeat_interleave(2, dim=1) for tensor in (key, value))
    expected = attend_segments(query, *wide, tree, window=window, softcap=softcap, scaling=0.25)
    assert torch.allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 0, 1, 5, 200])
def test_blocks_are_those_that_torch_finds_in_the_whole_mask(window: int | None) -> None:
    """All lists of blocks, of keys by queries and back, in part and whole, and what is seen within: by the definition, token by token."""
    rng = np.random.default_rng(0)
    trees = [grow_tree(rng, count) for count in (1, 2, 5, 9, 14)]
    for tree in [make_tree((9, 4, 11), (140, 12)), make_tree((128, 128, 256, 1), (7, 250), stem=128), *trees]:
        got, T = tree.block_mask(window), sum(tree.lengths)
        q, k = torch.arange(T)[:, None], torch.arange(T)[None, :]
        assert torch.equal(got.mask_mod(None, None, q, k), torch.from_numpy(see(tree, window)))
        expected = create_block_mask(got.mask_mod, None, None, T, T, device="cpu")
        lists = {name: values for name, values in vars(expected).items() if isinstance(values, torch.Tensor)}
        assert len(lists) == 8 and got.BLOCK_SIZE == expected.BLOCK_SIZE and got.seq_lengths == expected.seq_lengths
        for name, values in lists.items():
            assert torch.equal(getattr(got, name), values) and getattr(got, name).stride() == values.stride()


def grow_tree(rng: np.random.Generator, count: int) -> Tree:
    """Return a tree of so many segments, each on the one before it or on one of those that this one hangs on."""
    parents = [-1]
    for place in range(1, count):
        above = [place - 1]
        while above[-1] >= 0:
            above.append(parents[above[-1]])
        parents.append(int(rng.choice(above)))
    return Tree(lengths=tuple(rng.integers(1, 300, size=count).tolist()), parents=tuple(parents), device=CPU)


def see(tree: Tree, window: int | None) -> np.ndarray:
    """Return [T, T], whether a token sees another: of what its segment hangs on or of itself, no later one, none beyond the window."""
    above = [{place} for place in range(len(tree.parents))]
    for place, parent in enumerate(tree.parents):
        above[place] |= above[parent] if parent >= 0 else set()
    hangs_SS = np.array([[other in places for other in range(len(above))] for places in above])
    segment_T = np.repeat(np.arange(len(tree.lengths)), tree.lengths)
    distance = tree.positions()[:, None] - tree.positions()
    return hangs_SS[segment_T][:, segment_T] & (distance >= 0) & (distance < (window or np.inf))


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
    monkeypatch.setattr(tree_module, "tune_kernels", lambda device: tree_module.HOPPER_KERNELS)  # traced with the calls
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
    for count, responses, stem in ((6, 2, 0), (5, 4, 30), (20, 2, 150)):
        shared = rng.integers(0, 61, size=stem).astype(np.int32)
        groups = [
            make_group(rng, int(rng.integers(40, 90)), *rng.integers(2, 60, size=responses)) for _ in range(count)
        ]
        samples = [
            Rendered(ids_T=np.r_[shared, sample.ids_T], start=stem + sample.start)
            for group in groups
            for sample in group
        ]
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


def behind(system: np.ndarray, count: int, rng: np.random.Generator) -> list[Rendered]:
    """Return samples of which 20 tokens of their own are read, ten of a response of 11, behind a system prompt."""
    prompts = [np.r_[system, n, rng.integers(0, 61, size=9)] for n in range(count)]
    return [
        Rendered(ids_T=np.r_[prompt, rng.integers(0, 61, size=11)].astype(np.int32), start=len(prompt))
        for prompt in prompts
    ]


def test_a_long_system_prompt_counts_once_in_the_budget() -> None:
    """16 groups of 220 tokens, 200 of them shared: 300 hold five, each with 20 of its own, where they would hold one."""
    rng = np.random.default_rng(0)
    samples = behind(rng.integers(0, 61, size=200), 16, rng)
    batches = cut_trees(samples, np.arange(16), budget=300, whole_groups=False)
    assert sorted(map(len, batches)) == [4, 4, 4, 4]
    for batch in batches:
        micro = collate_trees([samples[index] for index in batch], np.arange(4), device=CPU)
        assert micro.num_tokens == 200 + 4 * 20
    lone = cut_trees(samples, np.arange(16), budget=100, whole_groups=False)
    assert sorted(lone) == [[index] for index in range(16)], "the shared tokens alone are above the budget"


def test_rows_with_one_of_two_system_prompts_and_one_with_none_share_what_they_can() -> None:
    """Eight, eight and one, mixed in a step: in 300 tokens five, three, five, three and one; in 600 a family, and the other with the one: levelled
    over two, both would read both."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 30, size=200), rng.integers(30, 61, size=200)
    mixed = [*behind(first, 8, rng), *behind(second, 8, rng), *behind(rng.integers(0, 61, size=200), 1, rng)]
    order = rng.permutation(17)
    samples = [mixed[index] for index in order]

    def cut(budget: int, ranks: int = 1) -> list[int]:
        batches = cut_trees(samples, np.arange(17), budget=budget, whole_groups=False, ranks=ranks)
        assert sorted(index for batch in batches for index in batch) == list(range(17))
        sizes = [collate_trees([samples[i] for i in b], np.arange(len(b)), device=CPU).num_tokens for b in batches]
        assert max(sizes) <= budget
        return sorted(sizes)

    assert cut(300) == [220, 260, 260, 300, 300]
    assert cut(1000) == [940]
    assert cut(600) == [360, 580]
    assert sum(cut(600, ranks=4)) <= 940 + 2 * 200


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
