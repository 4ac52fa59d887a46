"""Attention over a tree on CPUs: a segment's queries some at a time over the keys that they see, every core on calls of its own.

Torch's kernels share out heads over cores, in the backward pass heads of keys: three of them over two cores are two to one. They also compute
what is masked, half a call's own square, so a long segment is many calls. Kept for the backward pass are queries, keys, values and results
(and the logarithms of what these were divided by), once each, whatever sees them.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv

# q queries and k keys of a call; T tokens of the flat sequence; heads N of queries, M of keys, of size D

# Queries of a call: more of them have more masked keys, fewer take longer to begin with than they save. Fewer for many cores and few tokens.
MOST_QUERIES, LEAST_QUERIES = 128, 32
Found = TypeVar("Found")
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, eq=False)
class Call:
    """Queries next to each other in the flat sequence, and the stretches of it that they see, the last of which ends with them."""

    queries: slice
    seen: tuple[slice, ...]

    @property
    def cost(self) -> int:
        """Pairs that the kernel computes."""
        return count(self.queries) * sum(map(count, self.seen))


@dataclass(frozen=True, eq=False)
class Scores:
    """How scores are made of queries and keys."""

    mask_QK: Tensor  # additive; the last q rows and k columns are that of the last q of k tokens
    scaling: float
    softcap: float | None


def list_calls(lengths: Sequence[int], parents: Sequence[int], *, window: int | None, cores: int) -> tuple[Call, ...]:
    """Return the calls of a tree, by the tokens of its segments and the place of what each hangs on, -1 for nothing."""
    size = min(MOST_QUERIES, max(LEAST_QUERIES, sum(lengths) // (2 * cores)))
    paths: list[tuple[slice, ...]] = []
    calls: list[Call] = []
    end = 0
    for parent, length in zip(parents, lengths, strict=True):
        begin, end = end, end + length
        before = paths[parent] if parent >= 0 else ()
        paths.append(join(before, slice(begin, end)))
        for first in range(begin, end, size):
            queries = slice(first, min(first + size, end))
            seen = join(before, slice(begin, queries.stop))
            if window:
                seen = cut_front(seen, keep=count(queries) + window - 1)
            calls.append(Call(queries, seen))
    return tuple(calls)


def join(before: tuple[slice, ...], part: slice) -> tuple[slice, ...]:
    """Return stretches with one more behind them, which is one with the last where it goes on from there."""
    if before and before[-1].stop == part.start:
        return (*before[:-1], slice(before[-1].start, part.stop))
    return (*before, part)


def cut_front(parts: Sequence[slice], *, keep: int) -> tuple[slice, ...]:
    """Return the last tokens of some stretches."""
    kept: list[slice] = []
    for part in reversed(parts):
        if keep > 0:
            kept.append(slice(max(part.start, part.stop - keep), part.stop))
            keep -= count(part)
    return tuple(reversed(kept))


def count(part: slice) -> int:
    """Return the tokens of a stretch."""
    return int(part.stop - part.start)


def mask_calls(calls: Sequence[Call], *, window: int | None, dtype: torch.dtype) -> Tensor:
    """Return the mask that all calls have a part of."""
    most_queries = max(count(call.queries) for call in calls)
    return causal_mask(most_queries, max(sum(map(count, call.seen)) for call in calls), window, dtype)


def causal_mask(q: int, k: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Return [q, k]: 0 where the last q of k tokens may look, -inf elsewhere."""
    distance = torch.arange(k - q, k)[:, None] - torch.arange(k)[None, :]
    hidden = distance < 0
    if window:
        hidden |= distance >= window
    return torch.zeros(q, k, dtype=dtype).masked_fill(hidden, float("-inf"))


class SegmentAttention(torch.autograd.Function):
    """All calls of a layer: query [1, N, T, D], key and value [1, M, T, D] in, [1, T, N, D] out."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, calls: Sequence[Call], scores: Scores) -> Tensor:
        _, N, T, _ = query.shape
        fused, wide = is_fused(query, value, scores), torch.promote_types(query.dtype, torch.float32)
        out_BTND = query.new_empty(1, T, N, value.shape[-1])
        logz_BTN = query.new_empty(1, T, N if fused else 0, dtype=wide)
        out, logz = out_BTND.transpose(1, 2), logz_BTN.transpose(1, 2)

        def run(share: Sequence[Call]) -> None:
            for call in share:
                q, k, v = take(query, call.queries), gather(key, call.seen), gather(value, call.seen)
                got, norm = attend_call(q, k, v, scores)
                take(out, call.queries).copy_(got)
                if norm is not None:
                    take(logz, call.queries).copy_(norm)

        share_out(calls, run)
        ctx.calls, ctx.scores = calls, scores
        ctx.save_for_backward(query, key, value, out_BTND, logz_BTN)
        return out_BTND

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BTND: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out_BTND, logz_BTN = ctx.saved_tensors
        out, logz, grad = (tensor.transpose(1, 2) for tensor in (out_BTND, logz_BTN, grad_BTND))
        grad_query, wide = empty_by_token(query, query.dtype), logz.dtype

        def run(share: Sequence[Call]) -> tuple[Tensor, Tensor]:
            """Return the gradients of key and value, as far as they are of these calls: of narrow types a sum of many would not be."""
            totals = empty_by_token(key, wide).zero_(), empty_by_token(value, wide).zero_()
            for call in share:
                q, got, norm, grad_got = (take(tensor, call.queries) for tensor in (query, out, logz, grad))
                k, v = gather(key, call.seen), gather(value, call.seen)
                grad_q, *both = differentiate_call(grad_got, q, k, v, got, norm, ctx.scores)
                take(grad_query, call.queries).copy_(grad_q)
                for total, part in zip(totals, both, strict=True):
                    scatter_add(total, call.seen, part)
            return totals

        (grad_key, grad_value), *others = share_out(ctx.calls, run)
        for more_key, more_value in others:  # in the same order always: sums of floats depend on it
            grad_key += more_key
            grad_value += more_value
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def empty_by_token(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of the shape of [1, N, T, D] that lies token after token, as the layers before write and read it."""
    return tensor.new_empty(tensor.transpose(1, 2).shape, dtype=dtype).transpose(1, 2)


def attend_call(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor | None]:
    """Return (result, logarithm of the softmax's denominator where the kernel is fused)."""
    mask = scores.mask_QK[-q.shape[2] :, -k.shape[2] :]
    if is_fused(q, v, scores):
        out, logz = FUSED(q, k, v, attn_mask=mask, scale=scores.scaling)
        return out, logz
    return attend_dense(q, k, v, mask, softcap=scores.softcap, scaling=scores.scaling), None


def differentiate_call(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logz: Tensor, scores: Scores
) -> Sequence[Tensor]:
    """Return the gradients of q, k and v; where nothing is fused scores are computed again."""
    mask = scores.mask_QK[-q.shape[2] :, -k.shape[2] :]
    if is_fused(q, v, scores):
        grads: Sequence[Tensor] = FUSED_BACKWARD(
            grad, q, k, v, out, logz, 0.0, False, attn_mask=mask, scale=scores.scaling
        )
        return grads
    with torch.enable_grad():
        q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
        again = attend_dense(q, k, v, mask, softcap=scores.softcap, scaling=scores.scaling)
    return torch.autograd.grad(again, (q, k, v), grad)


def is_fused(q: Tensor, v: Tensor, scores: Scores) -> bool:
    """Whether torch has a kernel that holds no scores: capped ones have none."""
    return scores.softcap is None and q.shape[-1] == v.shape[-1]


def attend_dense(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, softcap: float | None, scaling: float
) -> Tensor:
    """Attend under an additive mask, with scores capped where there is a cap."""
    groups = query.shape[1] // key.shape[1]
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=groups > 1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scaling / softcap)) + mask
    return scores.softmax(dim=-1) @ value


def take(tensor: Tensor, part: slice) -> Tensor:
    """Return a stretch of the flat sequence of [1, M, T, D], which is not copied: what an index of three takes three calls for."""
    return tensor.narrow(2, part.start, count(part))


def gather(tensor: Tensor, parts: Sequence[slice]) -> Tensor:
    """Return stretches of the flat sequence of [1, M, T, D] as one."""
    return take(tensor, parts[0]) if len(parts) == 1 else torch.cat([take(tensor, part) for part in parts], dim=2)


def scatter_add(total: Tensor, parts: Sequence[slice], share: Tensor) -> None:
    """Add to stretches of the flat sequence what was found for them as one."""
    for part, more in zip(parts, share.split([count(part) for part in parts], dim=2), strict=True):
        take(total, part).add_(more)


def share_out(calls: Sequence[Call], run: Callable[[Sequence[Call]], Found]) -> list[Found]:
    """Return what `run` finds without gradients for each core's calls, the costliest first: each goes to the core that has the least then."""
    cores, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    loads, shares = [0] * cores, [list[Call]() for _ in range(cores)]
    for call in sorted(calls, key=lambda call: -call.cost):
        least = loads.index(min(loads))
        shares[least].append(call)
        loads[least] += call.cost
    if cores == 1:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return [run(calls)]

    def run_apart(share: Sequence[Call]) -> Found:  # torch's modes are a thread's own
        with torch.inference_mode(inference), torch.no_grad():
            return run(share)

    return list(start_pool(cores).map(run_apart, filter(None, shares)))


@cache
def start_pool(cores: int) -> ThreadPoolExecutor:
    """Return threads that have a core each: torch shares nothing out that they call."""
    pool, started = ThreadPoolExecutor(cores, thread_name_prefix="attention"), threading.Barrier(cores)

    def take_one() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread that has not asked takes the last number that any has set
        started.wait()

    for future in [pool.submit(take_one) for _ in range(cores)]:
        future.result()
    torch.set_num_threads(cores)  # of this thread, and of those that come later
    return pool
