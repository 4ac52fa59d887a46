"""Attention on CPUs, call by call: every query sees what a mask of the whole sequence lets it see, whatever the cores."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from training import segments
from training.segments import Call, list_calls, share_out
from training.tree import Tree, attend_segments

CPU = torch.device("cpu")


def show(calls: tuple[Call, ...]) -> list[tuple[tuple[int, int], list[tuple[int, int]]]]:
    return [((c.queries.start, c.queries.stop), [(part.start, part.stop) for part in c.seen]) for c in calls]


def test_calls_by_hand() -> None:
    """A prompt of 40 tokens, two responses of 3 and 50, and a lone one of 2: at most 32 queries at once. What follows is one stretch with it."""
    lengths, parents = (40, 3, 50, 2), (-1, 0, 0, -1)
    assert show(list_calls(lengths, parents, window=None, cores=2)) == [
        ((0, 32), [(0, 32)]),
        ((32, 40), [(0, 40)]),
        ((40, 43), [(0, 43)]),
        ((43, 75), [(0, 40), (43, 75)]),
        ((75, 93), [(0, 40), (43, 93)]),
        ((93, 95), [(93, 95)]),
    ]
    assert show(list_calls(lengths, parents, window=20, cores=2)) == [
        ((0, 32), [(0, 32)]),
        ((32, 40), [(13, 40)]),  # the first of eight queries sees 19 tokens before it
        ((40, 43), [(21, 43)]),
        ((43, 75), [(21, 40), (43, 75)]),
        ((75, 93), [(56, 93)]),
        ((93, 95), [(93, 95)]),
    ]


def test_calls_are_larger_where_there_is_much_for_each_core_and_never_small() -> None:
    def largest(tokens: int, cores: int) -> int:
        return max(c.queries.stop - c.queries.start for c in list_calls((tokens,), (-1,), window=None, cores=cores))

    assert [largest(4096, cores) for cores in (1, 16, 32, 64, 1000)] == [128, 128, 64, 32, 32]


def make_tree(rng: np.random.Generator) -> Tree:
    """Return a tree of up to nine segments, in which what hangs on a segment comes right behind it and what hangs on that."""
    lengths, parents, path = [], [], []
    for place in range(int(rng.integers(1, 10))):
        path = path[: int(rng.integers(0, len(path) + 1))]
        parents.append(path[-1] if path else -1)
        lengths.append(int(rng.integers(1, 40)))
        path.append(place)
    return Tree(tuple(lengths), tuple(parents), CPU)


def attend_whole(
    query: Tensor, key: Tensor, value: Tensor, tree: Tree, window: int | None, softcap: float | None
) -> Tensor:
    """Attend under one mask of the whole sequence, made pair by pair from parents and positions."""
    segment_T = np.repeat(np.arange(len(tree.lengths)), tree.lengths)
    above: list[set[int]] = []
    for place, parent in enumerate(tree.parents):
        above.append({place} | (above[parent] if parent >= 0 else set()))
    position_T, T = tree.positions(), len(segment_T)
    sees_TT = torch.tensor(
        [
            [
                segment_T[k] in above[segment_T[q]]
                and k <= q
                and (window is None or position_T[q] - position_T[k] < window)
                for k in range(T)
            ]
            for q in range(T)
        ]
    )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * 0.3
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~sees_TT, float("-inf")).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("value_size", [8, 6], ids=["fused", "values of another size"])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 7])
def test_results_and_gradients_are_those_of_one_mask(
    window: int | None, softcap: float | None, value_size: int, cores: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random trees in float64, calls of at most eight queries. Of three cores the same to the last bit again, results those of one core too."""
    monkeypatch.setattr(segments, "MOST_QUERIES", 8)
    monkeypatch.setattr(segments, "LEAST_QUERIES", 8)
    rng, source = np.random.default_rng(0), torch.Generator().manual_seed(0)
    for _ in range(8):
        tree = make_tree(rng)
        T = sum(tree.lengths)
        inputs = [
            torch.randn(1, T, heads, size, generator=source, dtype=torch.float64).transpose(1, 2).requires_grad_()
            for heads, size in ((6, 8), (2, 8), (2, value_size))
        ]
        grad = torch.randn(1, T, 6, value_size, generator=source, dtype=torch.float64)
        expected = attend_whole(*inputs, tree, window, softcap)
        wanted = [expected, *torch.autograd.grad(expected, inputs, grad)]
        found = []
        for count in (1, 3, 3):
            cores(count)
            out = attend_segments(*inputs, tree, window=window, softcap=softcap, scaling=0.3)
            found.append([out, *torch.autograd.grad(out, inputs, grad)])
        alone, together, again = found
        assert torch.equal(alone[0], together[0]) and all(map(torch.equal, together, again))
        for got in (alone, together):
            assert all(torch.allclose(value, want, rtol=0, atol=1e-12) for value, want in zip(got, wanted, strict=True))


def test_heads_whose_numbers_lie_apart_are_read_as_they_are() -> None:
    """The kernels would read what lies beside each, were they called with such tensors."""
    tree = Tree((9, 5), (-1, 0), CPU)
    apart = torch.randn(1, 4, 16, 14).transpose(2, 3)
    whole = apart.contiguous()
    got, want = (
        attend_segments(tensor, tensor, tensor, tree, window=None, softcap=None, scaling=0.25)
        for tensor in (apart, whole)
    )
    assert apart.stride(-1) != 1 and torch.equal(got, want)


def test_gradients_of_a_key_that_many_calls_see_are_added_up_in_float32(
    cores: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,048 tokens in bfloat16, calls of 32: the first keys' gradients are sums of 64. Added up in bfloat16 they are off by 0.012 and 0.018."""
    monkeypatch.setattr(segments, "MOST_QUERIES", 32)
    cores(1)
    tree = Tree((2048,), (-1,), CPU)
    source = torch.Generator().manual_seed(0)
    wide = [torch.randn(1, 2, 2048, 16, generator=source).requires_grad_() for _ in range(3)]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [tensor.to(dtype) for tensor in wide]
        out = attend_segments(*inputs, tree, window=None, softcap=None, scaling=0.25)
        found.append([g[:, :, :64].float() for g in torch.autograd.grad(out, inputs, torch.ones_like(out))])
    for want, got in zip(*found, strict=True):
        assert (got - want).norm() < 0.009 * want.norm()


@pytest.mark.parametrize("window", [None, 5])
def test_calls_and_their_mask_are_made_once_for_all_layers(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is capped or not, one mask for all calls; another where a layer has another window."""
    made: list[int] = []
    real = segments.causal_mask
    monkeypatch.setattr(segments, "causal_mask", lambda *arguments: made.append(1) or real(*arguments))
    tree = Tree((3, 9, 4, 11, 1, 14, 2), (-1, 0, 1, 1, 1, 0, 5), CPU)
    query = torch.randn(1, 4, sum(tree.lengths), 16)

    def attend(window: int | None, softcap: float | None) -> Tensor:
        return attend_segments(query, query, query, tree, window=window, softcap=softcap, scaling=0.25)

    first, *others = (attend(window, None) for _ in range(3))
    attend(window, 1.5)
    assert len(made) == 1 and all(torch.equal(first, other) for other in others)
    attend(9, None)
    assert len(made) == 2


def test_nothing_is_kept_but_inputs_and_results() -> None:
    tree = Tree((30, 20, 20, 20), (-1, 0, 0, 0), CPU)
    query = torch.randn(1, 4, 90, 16, requires_grad=True)
    key, value = (torch.randn(1, 2, 90, 16, requires_grad=True) for _ in range(2))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        attend_segments(query, key, value, tree, window=None, softcap=None, scaling=0.25)
    assert [tuple(tensor.shape) for tensor in kept] == [
        (1, 4, 90, 16), (1, 2, 90, 16), (1, 2, 90, 16), (1, 90, 4, 16), (1, 90, 4),
    ]  # fmt: skip


def test_under_autocast_and_without_gradients_it_is_as_narrow_as_torchs_own() -> None:
    tree = Tree((9, 5), (-1, 0), CPU)
    query = torch.randn(1, 4, 14, 16)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend_segments(query, query, query, tree, window=None, softcap=None, scaling=0.25)
    wide = attend_segments(query, query, query, tree, window=None, softcap=None, scaling=0.25)
    assert out.dtype == torch.bfloat16 and torch.allclose(out.float(), wide, atol=3e-2)


def test_a_fault_in_a_thread_is_raised(cores: Any) -> None:
    cores(2)
    calls = list_calls((64, 64), (-1, -1), window=None, cores=2)

    def fail(share: Any) -> None:
        if calls[1] in share:
            raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        share_out(calls, fail)
    assert torch.get_num_threads() == 2
