"""The output head: log-probabilities of targets from hidden states, over chunks of positions, so that [positions, vocabulary] is there for
positions of CHUNK_ELEMENTS logits at once, and never from the forward to the backward pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.tree import compile_on

# P positions that predict a trained token, C positions of a chunk, H hidden, V vocabulary

# Logits held at once: of a CPU 128 MiB in float32, more of which gain nothing; an accelerator wants more to do.
CHUNK_ELEMENTS = {"cpu": 2**25, "cuda": 2**28}


class Head(NamedTuple):
    """An output head over hidden states, position by position: log softmax(hidden W^T + b), its logits capped at +-softcap where the model
    does so."""

    hidden_PH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    target_P: Tensor
    softcap: float | None = None


class ChunkedLogp(torch.autograd.Function):
    """The log-probability of each position's target, chunk by chunk, whose logits the backward pass computes again: takes the parts of a Head."""

    @staticmethod
    def forward(ctx: Any, *parts: Any) -> Tensor:
        head = Head(*parts)
        ctx.dtype = find_dtype(head.hidden_PH)
        with torch.autocast(head.hidden_PH.device.type, enabled=False):
            matrix_VH, pick = head.weight_VH.to(ctx.dtype), compile_on(head.hidden_PH.device.type, pick_logps)
            logp_P = head.hidden_PH.new_empty(len(head.target_P), dtype=widen(ctx.dtype))
            for rows in chunks(head):
                logits_CV = head.hidden_PH[rows].to(ctx.dtype) @ matrix_VH.T
                fix_vocabulary(logits_CV)
                logp_P[rows] = pick(logits_CV, head.bias_V, head.target_P[rows], head.softcap)
                del logits_CV  # before the next chunk's are there
        ctx.softcap = head.softcap
        ctx.save_for_backward(*head[:4])
        return logp_P

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor | None, ...]:
        hidden_PH, weight_VH, bias_V, target_P = ctx.saved_tensors
        head = Head(hidden_PH, weight_VH, bias_V, target_P, ctx.softcap)
        _, *gradients = differentiate(head, grad_P, dtype=ctx.dtype, learns=ctx.needs_input_grad[1])
        return *gradients, None, *[None] * (len(ctx.needs_input_grad) - 4)


class WeightedLogp(torch.autograd.Function):
    """sum_P slope_P logp_P in float64, and logp_P as numbers alone: takes slope_P and the parts of a Head.

    The gradient of such a sum is known but for what it is multiplied with, so the forward pass finds it while a chunk's logits are there: none
    are kept, and none computed twice (as Liger, arXiv 2410.10989, does for cross-entropy).
    """

    @staticmethod
    def forward(ctx: Any, slope_P: Tensor, *parts: Any) -> tuple[Tensor, Tensor]:
        head = Head(*parts)
        dtype = find_dtype(head.hidden_PH)
        with torch.autocast(head.hidden_PH.device.type, enabled=False):
            logp_P, *ctx.gradients = differentiate(
                head, slope_P.to(widen(dtype)), dtype=dtype, learns=ctx.needs_input_grad[2]
            )
        ctx.mark_non_differentiable(logp_P)
        return (slope_P * logp_P.double()).sum(), logp_P

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of a weighted sum went to its first backward pass, where they lay")
        scaled = (None if gradient is None else gradient.mul_(grad.to(gradient.dtype)) for gradient in gradients)
        return None, *scaled, None, *[None] * (len(ctx.needs_input_grad) - 5)


def differentiate(
    head: Head, slope_P: Tensor, *, dtype: torch.dtype, learns: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return logp_P, and the gradients of sum_P slope_P logp_P: of hidden states, of the weight where it learns, and of the bias."""
    hidden_PH, weight_VH, bias_V, target_P, softcap = head
    matrix_VH = weight_VH.to(dtype)
    logp_P = hidden_PH.new_empty(len(target_P), dtype=widen(dtype))
    grad_hidden_PH = torch.empty_like(hidden_PH)
    grad_weight_VH = torch.zeros_like(weight_VH) if learns else None  # not beside an adapter
    grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V)
    weigh = compile_on(hidden_PH.device.type, weigh_logits)
    for rows in chunks(head):
        hidden_CH = hidden_PH[rows].to(dtype)
        logits_CV = hidden_CH @ matrix_VH.T
        fix_vocabulary(logits_CV)
        logp_P[rows], grad_CV, bias_share_V = weigh(logits_CV, bias_V, target_P[rows], slope_P[rows], softcap)
        if grad_bias_V is not None:
            grad_bias_V += bias_share_V
        grad_hidden_PH[rows] = (grad_CV @ matrix_VH).to(grad_hidden_PH.dtype)
        if grad_weight_VH is not None:
            add_product(grad_weight_VH, grad_CV.T, hidden_CH)
        del logits_CV, grad_CV  # before the next chunk's are there
    return logp_P, grad_hidden_PH, grad_weight_VH, grad_bias_V


def find_dtype(hidden_PH: Tensor) -> torch.dtype:
    """Return what a head's matrix products run in: as autocast has it, else as it was given."""
    kind = hidden_PH.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_PH.dtype


def fix_vocabulary(logits_CV: Tensor) -> None:
    """Let code that is compiled for logits be of their vocabulary: it reads rows then that it knows to be aligned."""
    if logits_CV.is_cuda:
        torch._dynamo.mark_static(logits_CV, 1)


def add_product(sum_VH: Tensor, left_VC: Tensor, right_CH: Tensor) -> None:
    """Add left times right to a sum, which is no narrower: in 8 bits it would lose what each of many chunks adds."""
    if sum_VH.dtype == left_VC.dtype:
        sum_VH.addmm_(left_VC, right_CH)
    else:
        sum_VH += left_VC @ right_CH


def pick_logps(logits_CV: Tensor, bias_V: Tensor | None, target_C: Tensor, softcap: float | None) -> Tensor:
    """Return logp_C of what the head gave, which is overwritten where it is wide enough."""
    logits_CV = finish_logits(logits_CV, bias_V, softcap)
    return logits_CV.gather(1, target_C[:, None]).squeeze(1) - logits_CV.logsumexp(dim=1)


def weigh_logits(
    logits_CV: Tensor, bias_V: Tensor | None, target_C: Tensor, slope_C: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (logp_C, gradient of what the head gave, of its bias) for the sum of slope_C logp_C: d logp / d logits = onehot(target) - softmax.

    It is written over the logits, to hold one chunk only; that of the targets apart, which compiled code writes once more.
    """
    dtype, target_C1, slope_C1 = logits_CV.dtype, target_C[:, None], slope_C[:, None]
    wide_CV = finish_logits(logits_CV, bias_V, softcap)
    # d cap tanh(z / cap) / dz = 1 - tanh^2
    slope_CV = None if softcap is None else 1.0 - (wide_CV / softcap).square_()
    picked_C1, largest_C1 = wide_CV.gather(1, target_C1), wide_CV.amax(dim=1, keepdim=True)
    wide_CV = wide_CV.sub_(largest_C1).exp_()
    sum_C1 = wide_CV.sum(dim=1, keepdim=True)
    logp_C1 = picked_C1 - largest_C1 - sum_C1.log()
    wide_CV = wide_CV.mul_(-slope_C1 / sum_C1)
    wide_C1 = wide_CV.gather(1, target_C1) + slope_C1
    if slope_CV is not None:
        wide_CV, wide_C1 = wide_CV.mul_(slope_CV), wide_C1 * slope_CV.gather(1, target_C1)
    bias_V = None if bias_V is None else wide_CV.scatter(1, target_C1, wide_C1).sum(dim=0)
    return logp_C1.squeeze(1), wide_CV.to(dtype).scatter_(1, target_C1, wide_C1.to(dtype)), bias_V


def finish_logits(logits_CV: Tensor, bias_V: Tensor | None, softcap: float | None) -> Tensor:
    """Return logits in float32 or wider, with the head's bias, capped at +-softcap where the model does so."""
    logits_CV = logits_CV.to(widen(logits_CV.dtype))
    if bias_V is not None:
        logits_CV.add_(bias_V)
    return logits_CV if softcap is None else logits_CV.div_(softcap).tanh_().mul_(softcap)


def widen(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which the log-softmax of logits of a type runs."""
    return torch.promote_types(dtype, torch.float32)


def chunks(head: Head) -> list[slice]:
    """Return slices over a head's positions, about equally long, each with at most CHUNK_ELEMENTS logits (one position has as many as it has)."""
    positions, vocabulary = len(head.target_P), len(head.weight_VH)
    most = max(1, CHUNK_ELEMENTS[head.hidden_PH.device.type] // vocabulary)
    size = -(-positions // max(1, -(-positions // most)))
    return [slice(begin, begin + size) for begin in range(0, positions, max(1, size))]
