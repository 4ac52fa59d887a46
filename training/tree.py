"""The tree layout: each prompt once, its responses behind it, prompts end to end in one flat sequence without padding.

A response sees its prompt and itself, never a sibling, and its positions go on from the prompt's end: K responses cost
P + KR tokens instead of K (P + R), and their log-probabilities are those of separate rows.

On a CPU attention runs segment by segment, so nothing is computed that is masked away. On a GPU one FlexAttention call
takes the whole sequence, with the mask as blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

# T tokens of the flat sequence; q, k tokens of a segment; heads N of size D

ATTENTION = "varflow_tree"
# Kinds of layers in which attention alone takes anything from token to token, and by no more than positions and a window.
LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class Tree:
    """Where prompts and responses lie in the flat sequence: for each prompt its length, then those of its responses."""

    lengths: tuple[tuple[int, ...], ...]
    device: torch.device
    _masks: dict[tuple[Any, ...], Any] = field(default_factory=dict, compare=False)

    @property
    def segments(self) -> list[int]:
        """Lengths of all prompts and responses, in order."""
        return [length for group in self.lengths for length in group]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(Position of its first token, length) of all prompts and responses, in order."""
        return [(group[0] if place else 0, n) for group in self.lengths for place, n in enumerate(group)]

    def positions(self) -> np.ndarray:
        """Return position_T: from 0 in a prompt, from the prompt's end in each of its responses."""
        return np.concatenate([np.arange(begin, begin + n) for begin, n in self.spans])

    def response_masks(self, window: int | None, dtype: torch.dtype) -> list[list[Tensor]]:
        """Return for each prompt's each response the additive mask [q, prompt + q]; made once, used in every layer."""
        key = ("responses", window, dtype)
        if key not in self._masks:
            self._masks[key] = [
                [causal_mask(n, group[0] + n, window, dtype, self.device) for n in group[1:]] for group in self.lengths
            ]
        masks: list[list[Tensor]] = self._masks[key]
        return masks

    def prompt_masks(self, window: int | None, dtype: torch.dtype, *, capped: bool) -> list[Tensor | None]:
        """Return for each prompt the additive mask [q, q], None where plain causal attention needs none; made once likewise."""
        if not (window or capped):
            return [None] * len(self.lengths)
        key = ("prompts", window, dtype)
        if key not in self._masks:
            self._masks[key] = [causal_mask(group[0], group[0], window, dtype, self.device) for group in self.lengths]
        masks: list[Tensor | None] = self._masks[key]
        return masks

    def block_mask(self, window: int | None) -> Any:
        """Return FlexAttention's mask of the whole sequence."""
        from torch.nn.attention.flex_attention import create_block_mask

        key = ("blocks", window)
        if key not in self._masks:
            count = len(self.segments)
            # In 32 bits: each element of a mask that is no whole block reads four of them.
            segment_T = send(np.repeat(np.arange(count, dtype=np.int32), self.segments), device=self.device)
            groups = np.repeat(np.arange(len(self.lengths), dtype=np.int32), [sum(group) for group in self.lengths])
            group_T = send(groups, device=self.device)
            is_prompt = [place == 0 for group in self.lengths for place in range(len(group))]
            prompt_T = send(np.repeat(is_prompt, self.segments), device=self.device)
            position_T = send(self.positions().astype(np.int32), device=self.device)
            farthest = np.array(window or len(position_T), dtype=np.int32)
            reach = send(farthest, device=self.device)  # a number would be compiled for each

            def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
                reachable = (group_T[q] == group_T[k]) & (prompt_T[k] | (segment_T[q] == segment_T[k]))
                distance = position_T[q] - position_T[k]
                return reachable & (distance >= 0) & (distance < reach)

            T = len(position_T)
            make = compile_on(self.device.type, create_block_mask)  # which never holds the mask of T x T
            self._masks[key] = make(sees, None, None, T, T, device=self.device)
        return self._masks[key]

    def no_mask(self) -> Tensor:
        """Return what a model is given as its mask, so that it makes none: the tree says it all."""
        return torch.zeros(1, 1, 1, 1, device=self.device)


def send(values: np.ndarray, *, device: torch.device) -> Tensor:
    """Return an array as a tensor on its way to a device: from pinned memory, so that nobody waits for it to arrive."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def causal_mask(q: int, k: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return [q, k]: 0 where the last q of k tokens may look, -inf elsewhere."""
    distance = torch.arange(k - q, k, device=device)[:, None] - torch.arange(k, device=device)[None, :]
    hidden = distance < 0
    if window:
        hidden |= distance >= window
    return torch.zeros(q, k, dtype=dtype, device=device).masked_fill(hidden, float("-inf"))


def enable_trees(model: Any) -> None:
    """Let a model's attention take a `tree`. ValueError where its attention is its own and takes no other, and where something
    else takes part: a state (linear attention, Mamba) or a convolution runs along the sequence, from a response to its sibling."""
    kind = model.config.model_type
    others = sorted(set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - LAYERS)
    if others or model._is_stateful:
        raise ValueError(
            f"model type {kind}: its layers ({', '.join(others) or 'with a state'}) join tokens by more than attention, so a response would "
            "see its siblings and prompts cannot be shared; set runtime.layout to rows"
        )
    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # of plain calls, whose windows are in the mask alone
    model.set_attn_implementation(ATTENTION)
    if model.config._attn_implementation != ATTENTION:
        raise ValueError(
            f"model type {kind}: its attention cannot be replaced, so prompts cannot be shared; set runtime.layout to rows"
        )


@torch.compiler.disable  # beside it layers may be compiled: what depends on a tree's lengths would be compiled for each
def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [1, N, T, D] in, [1, T, N, D] out. Without a tree it is the stock one."""
    tree: Tree | None = options.pop("tree", None)
    if tree is None:
        return attend_plain(module, query, key, value, attention_mask, **options), None
    window, softcap = options.get("sliding_window"), options.get("softcap")
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    if query.device.type == "cuda":
        return attend_blocks(query, key, value, tree, window=window, softcap=softcap, scaling=scaling), None
    return attend_segments(query, key, value, tree, window=window, softcap=softcap, scaling=scaling), None


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
        mask = causal_mask(query.shape[2], key.shape[2], None, query.dtype, query.device)
    elif mask.dtype == torch.bool:
        # A number and not -inf: padding on the left sees nothing, and of that softmax would make NaN.
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    return attend_dense(query, key, value, mask, softcap=softcap, scaling=scaling).transpose(1, 2)


def attend_segments(
    query: Tensor, key: Tensor, value: Tensor, tree: Tree, *, window: int | None, softcap: float | None, scaling: float
) -> Tensor:
    """Attend prompt by prompt and response by response. One split each: slicing would cost a full gradient a slice."""
    q, k, v = (iter(tensor.split(tree.segments, dim=2)) for tensor in (query, key, value))
    prompt_masks = tree.prompt_masks(window, query.dtype, capped=softcap is not None)
    response_masks = tree.response_masks(window, query.dtype)
    out: list[Tensor] = []
    for group, prompt_mask, group_masks in zip(tree.lengths, prompt_masks, response_masks, strict=True):
        prompt_q, prompt_k, prompt_v = next(q), next(k), next(v)
        if group[0]:
            out.append(attend_dense(prompt_q, prompt_k, prompt_v, prompt_mask, softcap=softcap, scaling=scaling))
        for mask in group_masks:
            response_k, response_v = torch.cat([prompt_k, next(k)], dim=2), torch.cat([prompt_v, next(v)], dim=2)
            out.append(attend_dense(next(q), response_k, response_v, mask, softcap=softcap, scaling=scaling))
    return torch.cat([part.transpose(1, 2) for part in out], dim=1)


def attend_dense(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, softcap: float | None, scaling: float
) -> Tensor:
    """Attend under an additive mask, causally without one; capped scores have no fused kernel, which reads a key for all its heads."""
    groups = query.shape[1] // key.shape[1]
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=groups > 1
        )
    assert mask is not None
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scaling / softcap)) + mask
    return scores.softmax(dim=-1) @ value


def attend_blocks(
    query: Tensor, key: Tensor, value: Tensor, tree: Tree, *, window: int | None, softcap: float | None, scaling: float
) -> Tensor:
    """Attend with FlexAttention over the whole sequence."""
    from torch.nn.attention.flex_attention import flex_attention

    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # as torch would itself, but the choice of the kernel depends on it
        query, key, value = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (query, key, value))
    out: Tensor = compile_on(kind, flex_attention)(
        query, key, value, score_mod=cap_scores(softcap, query.device), block_mask=tree.block_mask(window), scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1], kernel_options=choose_kernel(query),
    )  # fmt: skip
    return out.transpose(1, 2).contiguous()


def choose_kernel(query: Tensor) -> dict[str, Any]:
    """Return how FlexAttention's kernel is to run: of its choices for 16-bit types the one with which a step of Llama 3.2 1B on an
    H200 spends 7 ms in it instead of 197; and never the one for answers token by token, which takes no tree."""
    options: dict[str, Any] = {"BACKEND": "TRITON"}
    if query.dtype.itemsize == 2 and query.shape[-1] <= 128:
        options |= {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_stages": 3, "fwd_num_warps": 4}
    return options


@cache
def cap_scores(softcap: float | None, device: torch.device) -> Any:
    """Return the score function of a cap; always the same one, or every layer would be compiled anew."""
    if softcap is None:
        return None
    with torch.inference_mode(False):  # it is kept for the backward pass of others
        limit = torch.tensor(softcap, device=device)  # a number would be one that is read from the device

    def cap(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return limit * torch.tanh(score / limit)

    return cap


@cache
def compile_on(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of FlexAttention, compiled where there is a GPU: as it is, it would hold all scores."""
    return torch.compile(function, dynamic=True) if kind == "cuda" else function
