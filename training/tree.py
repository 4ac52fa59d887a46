"""The tree layout: what prompts share once, behind it what is each prompt's own, behind that its responses, end to end in one flat
sequence without padding.

A segment sees itself and what it hangs on, never a sibling, and its positions go on from there: K responses cost P + KR tokens
instead of K (P + R), G prompts with a system prompt of S tokens S + G (P - S) instead of G P, and log-probabilities are those of separate rows.

On a CPU attention runs segment by segment (training/segments.py), so next to nothing is computed that is masked away. On a GPU one
FlexAttention call takes the whole sequence, with the mask as blocks; where layers are compiled it is a part of them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from training.segments import (
    Call,
    Scores,
    SegmentAttention,
    attend_dense,
    causal_mask,
    list_calls,
    mask_calls,
)

# T tokens of the flat sequence; S segments; q, k tokens of a segment; Q, K blocks of tokens; heads N of size D

COMPILED_VARIANTS = 64
HOPPER_KERNELS = {  # with which it was fastest in a step of Llama 3.2 1B on an H200 (docs/performance.md)
    "fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_stages": 3, "fwd_num_warps": 4,
    "bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 64, "bwd_num_stages": 2, "bwd_num_warps": 4,
}  # fmt: skip
# Of heads of up to 128 float32 numbers: torch's own for Hopper spills 32 KB a thread, this one nothing (as Triton compiles both for it).
WIDE_KERNEL = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 16, "fwd_num_warps": 8}
ATTENTION = "varflow_tree"
BLOCK = 128  # queries and keys that FlexAttention skips together: its kernels for Hopper take no smaller ones
# Kinds of layers in which attention alone takes anything from token to token, and by no more than positions and a window.
LAYERS = {"full_attention", "sliding_attention"}


@dataclass(eq=False)  # not frozen: torch 2.11 compiles layers anew for what a frozen one holds
class Tree:
    """Where segments lie in the flat sequence, what hangs on one right behind it. Equal to itself alone."""

    lengths: tuple[int, ...]  # tokens of each segment, at least 1
    parents: tuple[int, ...]  # the place of the segment that each hangs on, -1 where it begins a sequence
    device: torch.device
    # FlexAttention's, of windows that are known before the layers run, and the options of its kernels on this device
    block_masks: dict[int | None, Any] = field(default_factory=dict)
    kernel_options: dict[str, Any] = field(default_factory=dict)
    _found: dict[tuple[Any, ...], Any] = field(default_factory=dict)  # of a layer, for all that are like it

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """(Position of its first token, tokens) of each segment."""
        spans: list[tuple[int, int]] = []
        for parent, length in zip(self.parents, self.lengths, strict=True):
            spans.append((sum(spans[parent]) if parent >= 0 else 0, length))
        return spans

    def positions(self) -> np.ndarray:
        """Return position_T: from 0 where a sequence begins, from the end of what it hangs on in every other segment."""
        return np.concatenate([np.arange(begin, begin + n) for begin, n in self.spans])

    def calls(self, window: int | None, dtype: torch.dtype) -> tuple[Sequence[Call], Tensor]:
        """Return what a layer's attention on a CPU is made of, and the mask that all of it has a part of."""
        key = ("calls", window, dtype, torch.get_num_threads())
        if key not in self._found:
            calls = list_calls(self.lengths, self.parents, window=window, cores=torch.get_num_threads())
            self._found[key] = calls, mask_calls(calls, window=window, dtype=dtype)
        found: tuple[Sequence[Call], Tensor] = self._found[key]
        return found

    def ends(self) -> np.ndarray:
        """Return end_T: where in the sequence the last of those lies that see a token, which is one that hangs on its segment, and goes on."""
        ends = np.cumsum(self.lengths)
        for place, parent in reversed(list(enumerate(self.parents))):
            if parent >= 0:
                ends[parent] = max(ends[parent], ends[place])
        return np.repeat(ends, self.lengths)

    def seen(self, window: int | None) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (first_T, stop_T) of stretches, which never touch: in each the token at t sees what lies at [first, stop).

        The first ends with the token. What a segment hangs on is of the same stretch where the segment follows it at once.
        """
        lengths, begins = np.array(self.lengths), np.array([begin for begin, _ in self.spans])
        flat_S = np.cumsum(lengths) - lengths
        head_S, above_S = list_stretches(self.parents)
        position_T, at_S = self.positions(), np.arange(len(lengths))
        stop_T = np.arange(len(position_T)) + 1
        found = []
        while (at_S >= 0).any():
            first_T = np.repeat(np.where(at_S >= 0, flat_S[head_S[at_S]], 0), self.lengths)
            if window:
                skipped_T = np.maximum(position_T - window + 1 - np.repeat(begins[head_S[at_S]], self.lengths), 0)
                first_T = np.minimum(first_T + skipped_T, stop_T)
            found.append((first_T, stop_T))
            at_S = np.where(at_S >= 0, above_S[at_S], -1)
            stop_T = np.repeat(np.where(at_S >= 0, (flat_S + lengths)[at_S], 0), self.lengths)
        return found

    def make_block_masks(self, windows: Iterable[int | None]) -> None:
        """Find what FlexAttention needs of the tree, for each window, before layers run that may be compiled code."""
        self.kernel_options.update(tune_kernels(self.device))
        self.block_masks.update({window: self.block_mask(window) for window in windows})

    def block_mask(self, window: int | None) -> Any:
        """Return FlexAttention's mask of the whole sequence, whose blocks are found here: T x T is never held, nor computed."""
        from torch.nn.attention.flex_attention import BlockMask

        key = ("blocks", window)
        if key not in self._found:
            lists: dict[str, Any] = {}
            partial_QK, full_QK = find_blocks(self.seen(window), sum(self.lengths))
            for name, blocks in (("kv", partial_QK), ("full_kv", full_QK), ("q", partial_QK.T), ("full_q", full_QK.T)):
                counts, indices = (send(values, device=self.device) for values in list_blocks(blocks))
                lists |= {f"{name}_num_blocks": counts, f"{name}_indices": indices}
            lengths = (sum(self.lengths),) * 2
            self._found[key] = BlockMask(
                lengths, mask_mod=self.make_mask_mod(window), BLOCK_SIZE=(BLOCK, BLOCK), **lists
            )
        return self._found[key]

    def make_mask_mod(self, window: int | None) -> Callable[..., Tensor]:
        """Return FlexAttention's mask as a function of query and key: one sees another from this on, as far as something hangs on it."""
        end_T = send(self.ends().astype(np.int32), device=self.device)

        def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & (q < end_T[k])

        if not window:
            return sees
        position_T = self.positions().astype(np.int32)
        first_T = send(position_T - np.int32(window - 1), device=self.device)
        place_T = send(position_T, device=self.device)

        def sees_near(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & (q < end_T[k]) & (place_T[k] >= first_T[q])

        return sees_near

    def no_mask(self) -> Tensor:
        """Return what a model is given as its mask, so that it makes none: the tree says it all."""
        return torch.zeros(1, 1, 1, 1, device=self.device)


def list_stretches(parents: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return (head_S, above_S) of each segment: the first of the unbroken chain of parents that ends with it, and the parent of that first
    one, -1 for none."""
    head_S, above_S = np.arange(len(parents)), np.array(parents)
    for place, parent in enumerate(parents):
        if parent >= 0 and parent == place - 1:
            head_S[place], above_S[place] = head_S[parent], above_S[parent]
    return head_S, above_S


def find_blocks(stretches: Sequence[tuple[np.ndarray, np.ndarray]], count_T: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (partial_QK, full_QK): which blocks of queries and keys hold something that is seen (`Tree.seen`), and which nothing else."""
    query_T = np.arange(count_T)
    count = -(-count_T // BLOCK)
    some_QK, whole_QK = np.zeros((2, count, count + 1), dtype=np.int32)  # queries that see some of a block, all of it
    for begin_T, stop_T in stretches:
        for total_QK, left_T, right_T in (
            (some_QK, begin_T // BLOCK, -(-stop_T // BLOCK)),
            (whole_QK, -(-begin_T // BLOCK), stop_T // BLOCK),
        ):
            at = np.flatnonzero((begin_T < stop_T) & (left_T < right_T))
            np.add.at(total_QK, (query_T[at] // BLOCK, left_T[at]), 1)
            np.add.at(total_QK, (query_T[at] // BLOCK, right_T[at]), -1)
    some_QK, whole_QK = (total_QK.cumsum(axis=1)[:, :-1] for total_QK in (some_QK, whole_QK))
    full_QK = whole_QK == BLOCK
    return (some_QK > 0) & ~full_QK, full_QK


def list_blocks(blocks_QK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (count_11Q, index_11QK) as FlexAttention reads blocks: how many a row has, and which, in order, the others behind them."""
    counts, indices = blocks_QK.sum(axis=1, dtype=np.int32), np.argsort(~blocks_QK, axis=1, kind="stable")
    return counts.reshape(1, 1, -1), indices.astype(np.int32).reshape(1, 1, *indices.shape)


def send(values: np.ndarray, *, device: torch.device) -> Tensor:
    """Return an array as a tensor on its way to a device: from pinned memory, so that nobody waits for it to arrive."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def enable_trees(model: Any) -> None:
    """Let a model's attention take a `tree`. ValueError where its attention is its own and takes no other, and where something
    else takes part: a state (linear attention, Mamba) or a convolution runs along the sequence, from a response to its sibling."""
    kind = model.config.model_type
    others = sorted(set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - LAYERS)
    if others or model._is_stateful:
        raise ValueError(
            f"model type {kind}: its layers ({', '.join(others) or 'with a state'}) join tokens by more than attention to all before or to a window, which no tree computes, "
            "so prompts cannot be shared; set runtime.layout to rows"
        )
    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # of plain calls, whose windows are in the mask alone
    model.set_attn_implementation(ATTENTION)
    if model.config._attn_implementation != ATTENTION:
        raise ValueError(
            f"model type {kind}: its attention cannot be replaced, so prompts cannot be shared; set runtime.layout to rows"
        )


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [1, N, T, D] in, [1, T, N, D] out. Without a tree it is the stock one."""
    tree: Tree | None = options.pop("tree", None)
    window, softcap = options.get("sliding_window"), options.get("softcap")
    if tree is None or softcap is not None or window not in tree.block_masks:
        return attend_apart(module, query, key, value, attention_mask, tree, **options), None
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    blocks, tuned = tree.block_masks[window], tree.kernel_options
    return attend_blocks(query, key, value, blocks, tuned, softcap=None, scaling=scaling), None


@torch.compiler.disable  # what depends on a tree's lengths would be compiled for each
def attend_apart(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    tree: Tree | None,
    **options: Any,
) -> Tensor:
    """Attend beside compiled layers."""
    if tree is None:
        return attend_plain(module, query, key, value, attention_mask, **options)
    window, softcap = options.get("sliding_window"), options.get("softcap")
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    if query.device.type == "cuda":
        blocks, tuned = tree.block_mask(window), tune_kernels(query.device)
        return attend_blocks(query, key, value, blocks, tuned, softcap=softcap, scaling=scaling)
    return attend_segments(query, key, value, tree, window=window, softcap=softcap, scaling=scaling)


def attend_segments(
    query: Tensor, key: Tensor, value: Tensor, tree: Tree, *, window: int | None, softcap: float | None, scaling: float
) -> Tensor:
    """Attend segment by segment."""
    # kernels that are called by their names read numbers as if those of a head lay side by side
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in narrow(query, key, value))
    calls, mask_QK = tree.calls(window, query.dtype)
    out: Tensor = SegmentAttention.apply(query, key, value, calls, Scores(mask_QK, scaling, softcap))
    return out


def narrow(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return what attention reads as autocast has it: a kernel that is called by its name is not looked after."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(t if t.dtype == torch.float64 else t.to(torch.get_autocast_dtype(kind)) for t in tensors)


def attend_plain(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Tensor:
    """Attend as SDPA does; it has no cap for scores, so where there is one they are capped here under SDPA's mask."""
    softcap = options.get("softcap")
    if softcap is None:
        out: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0]
        return out
    mask = attention_mask
    if mask is None:
        mask = causal_mask(query.shape[2], key.shape[2], None, query.dtype).to(query.device)
    elif mask.dtype == torch.bool:
        # A number and not -inf: padding on the left sees nothing, and of that softmax would make NaN.
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    return attend_dense(query, key, value, mask, softcap=softcap, scaling=scaling).transpose(1, 2)


def attend_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Any,
    tuned: dict[str, Any],
    *,
    softcap: float | None,
    scaling: float,
) -> Tensor:
    """Attend with FlexAttention over the whole sequence; what its kernels are `tuned` to is taken for 16-bit types."""
    from torch.nn.attention.flex_attention import flex_attention

    query, key, value = narrow(query, key, value)  # the choice of the kernel depends on it
    run: Any = flex_attention if torch.compiler.is_compiling() else compile_on(query.device.type, flex_attention)
    out: Tensor = run(
        query, key, value, score_mod=None if softcap is None else cap_scores(softcap, query.device), block_mask=blocks, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1], kernel_options=choose_kernel(query, tuned),
    )  # fmt: skip
    return out.transpose(1, 2).contiguous()


def choose_kernel(query: Tensor, tuned: dict[str, Any]) -> dict[str, Any]:
    """Return how FlexAttention's kernels are to run: never as the one for answers token by token, which takes no tree."""
    chosen: dict[str, Any] = {"BACKEND": "TRITON"}
    if not tuned or query.shape[-1] > 128:
        return chosen
    return chosen | {2: tuned, 4: WIDE_KERNEL}.get(query.dtype.itemsize, {})


@cache
def tune_kernels(device: torch.device) -> dict[str, Any]:
    """Return the options of FlexAttention's kernels for Hopper; torch's own on other devices, where they may not even fit."""
    if device.type != "cuda" or torch.version.hip:  # some of AMD's are of capability 9 too
        return {}
    return HOPPER_KERNELS if torch.cuda.get_device_capability(device)[0] == 9 else {}


@cache
def cap_scores(softcap: float, device: torch.device) -> Any:
    """Return the score function of a cap; always the same one, or every layer would be compiled anew."""
    with torch.inference_mode(False):  # it is kept for the backward pass of others
        limit = torch.tensor(softcap, device=device)  # a number would be one that is read from the device

    def cap(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return limit * torch.tanh(score / limit)

    return cap


def compile_on(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of FlexAttention, compiled where there is a GPU: as it is, it would hold all scores. An error where it cannot be."""
    if kind != "cuda":
        return function
    allow_variants()  # each time: the limit is a thread's own, and backward passes have theirs
    return compile_whole(function)


@cache
def compile_whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function as compiled code, the same for all who ask."""
    return torch.compile(function, dynamic=True, fullgraph=True)


def allow_variants() -> None:
    """Let code be compiled for more kinds of sizes than torch's 8: two kinds of layers in five classes of lengths are ten, with and without
    gradients, and beyond the limit all others would run as they are, or fail."""
    torch._dynamo.config.recompile_limit = max(COMPILED_VARIANTS, torch._dynamo.config.recompile_limit)
