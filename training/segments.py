"""Attention over a tree on CPUs: a segment's queries some at a time over the keys that they see, every core on calls of its own.

Torch's kernels share out heads over cores, in the backward pass heads of keys: three of them over two cores are two to one. They also compute
what is masked, half a call's own square, so a long segment is many calls. Kept for the backward pass are queries, keys, values and results,
once each, whatever sees them.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv

# q queries and k keys of a call; T tokens of the flat sequence; heads N of queries, M of keys, of size D

# Queries of a call: more of them have more masked keys, fewer take longer to begin with than they save. Fewer for many cores and few tokens.
MOST_QUERIES, LEAST_QUERIES = 128, 32
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, eq=False)
class Call:
    """Queries next to each other in the flat sequence, and the stretches of it that they see, the last of which ends with them."""

    queries: slice
    seen: tuple[slice, ...]
    shared: int  # tokens of `seen` that other calls see too: all, or all but the queries' own

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
    hung_on = set(parents)
    paths: list[tuple[slice, ...]] = []
    calls: list[Call] = []
    end = 0
    for place, (parent, length) in enumerate(zip(parents, lengths, strict=True)):
        begin, end = end, end + length
        before = paths[parent] if parent >= 0 else ()
        paths.append(join(before, slice(begin, end)))
        for first in range(begin, end, size):
            queries = slice(first, min(first + size, end))
            q = count(queries)
            seen = join(before, slice(begin, queries.stop))
            if window:
                seen = cut_front(seen, keep=q + window - 1)
            alone = queries.stop == end and place not in hung_on
            calls.append(Call(queries, seen, sum(map(count, seen)) - (q if alone else 0)))
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
        out_BTND = query.new_empty(1, T, N, value.shape[-1])
        logz_BTN = query.new_empty(1, T, N, dtype=torch.promote_types(query.dtype, torch.float32))
        out, logz = out_BTND.transpose(1, 2), logz_BTN.transpose(1, 2)

        def run(call: Call) -> None:
            q, k, v = query[:, :, call.queries], gather(key, call.seen), gather(value, call.seen)
            out[:, :, call.queries], norm = attend_call(q, k, v, scores)
            if norm is not None:
                logz[:, :, call.queries] = norm

        share_out(calls, run)
        ctx.calls, ctx.scores = calls, scores
        ctx.save_for_backward(query, key, value, out_BTND, logz_BTN)
        return out_BTND

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BTND: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out_BTND, logz_BTN = ctx.saved_tensors
        out, logz, grad = (tensor.transpose(1, 2) for tensor in (out_BTND, logz_BTN, grad_BTND))
        grad_query = empty_by_token(query)
        grads = empty_by_token(key).zero_(), empty_by_token(value).zero_()
        shares: dict[Call, Sequence[Tensor]] = {}

        def run(call: Call) -> None:
            q, got, norm, grad_got = (tensor[:, :, call.queries] for tensor in (query, out, logz, grad))
            k, v = gather(key, call.seen), gather(value, call.seen)
            grad_query[:, :, call.queries], *both = differentiate_call(grad_got, q, k, v, got, norm, ctx.scores)
            if call.shared < k.shape[2]:
                for total, share in zip(grads, both, strict=True):
                    total[:, :, call.queries] = share[:, :, call.shared :]
            shares[call] = both

        def add_up(place: int) -> None:
            for call in ctx.calls:  # in the same order always: sums of floats depend on it
                at = 0
                for part in call.seen:
                    n = min(count(part), call.shared - at)
                    if n:
                        grads[place][:, :, part.start : part.start + n] += shares[call][place][:, :, at : at + n]
                    at += n

        share_out(ctx.calls, run)
        run_all([partial(add_up, 0), partial(add_up, 1)])
        return grad_query, *grads, None, None


def empty_by_token(tensor: Tensor) -> Tensor:
    """Return a tensor of the shape of [1, N, T, D] that lies token after token, as the layers before write and read it."""
    return torch.empty_like(tensor.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


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


def gather(tensor: Tensor, parts: Sequence[slice]) -> Tensor:
    """Return stretches of the flat sequence of [1, M, T, D] as one."""
    return tensor[:, :, parts[0]] if len(parts) == 1 else torch.cat([tensor[:, :, part] for part in parts], dim=2)


def share_out(calls: Sequence[Call], run: Callable[[Call], None]) -> None:
    """Run calls, the costliest first, each on the core that has the least to do then."""
    cores = torch.get_num_threads()
    loads, shares = [0] * cores, [list[Call]() for _ in range(cores)]
    for call in sorted(calls, key=lambda call: -call.cost):
        least = loads.index(min(loads))
        shares[least].append(call)
        loads[least] += call.cost

    def run_share(share: Sequence[Call]) -> None:
        for call in share:
            run(call)

    run_all([partial(run_share, share) for share in shares])


def run_all(works: Iterable[Callable[[], None]]) -> None:
    """Do some work without gradients, all of it at once, each on a core of its own."""
    cores, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def run(work: Callable[[], None]) -> None:  # as the caller would: torch's modes are a thread's own
        with torch.inference_mode(inference), torch.no_grad(), torch.autocast("cpu", enabled=False):
            work()

    for _ in map(run, works) if cores == 1 else start_pool(cores).map(run, works):
        pass


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
