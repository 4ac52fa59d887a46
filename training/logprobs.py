"""Summed log-probabilities of responses, with logits only where a trained token is predicted.

Hidden states are gathered before the output head, and the head runs over chunks of positions, forward and backward, so that
[positions, vocabulary] is there for positions of CHUNK_ELEMENTS logits at once; the last chunk's are kept from the one to the other.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.config import Layout
from training.data.batch import MicroBatch, collate, lay_out
from training.flops import read_windows
from training.render import Rendered
from training.tree import ATTENTION, compile_on, enable_trees

# B sequences, T tokens, P positions that predict a trained token, C positions of a chunk, H hidden, V vocabulary

MAX_LAYOUT_GAP = {
    torch.float64: 1e-6,
    torch.float32: 1e-4,
    torch.bfloat16: 3e-2,
}  # nats per token; a wrong mask is far off
# How many times the mean one token may be off: in bfloat16 0.9 nats, of the seven families in tests/architectures.py 0.03 at most.
ONE_TOKEN = 30
SIBLINGS = 2  # of a prompt's responses, that a layout is tried on
SOME_IDS = np.arange(6)  # that a model has, whatever its tokenizer
# Logits held at once: of a CPU 256 MiB in float32, which is all of a small step, so that none is computed again; an accelerator wants more.
CHUNK_ELEMENTS = {"cpu": 2**26, "cuda": 2**28}


class Policy(nn.Module):
    """A causal language model as one module, whatever is computed with it: forward(compute, *arguments) is
    compute(model, *arguments). What shards the parameters sees every use of them, the output head's too."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        """Return compute(model, *arguments)."""
        return compute(self.model, *arguments)


def as_policy(model: Any) -> Policy:
    """Return a language model as a policy; a policy as it is."""
    return model if isinstance(model, Policy) else Policy(model)


def sum_logps(model: Any, micro: MicroBatch) -> Tensor:
    """Return logp_B in nats, float64: the log-probability of each sample's trained tokens, stop token included.

    `model` is a causal language model or its Policy. Differentiable in the parameters. The log-softmax runs in float32
    (float64 for a float64 model).
    """
    parts = as_policy(model)(trained_logps, micro).double().split(micro.trained)
    return torch.stack([logp_P.sum() for logp_P in parts])


def trained_logps(model: Any, micro: MicroBatch) -> Tensor:
    """Return logp_P: the log-probability of every trained token of the micro-batch, sample after sample.

    ValueError for trees where the model's attention was not made ready for them: it would take siblings for one long answer.
    """
    tree = micro.tree
    if tree and model.config._attn_implementation != ATTENTION:
        raise ValueError(
            f"model type {model.config.model_type}: got a micro-batch of trees for the attention {model.config._attn_implementation!r}, "
            f"expected {ATTENTION!r}; call check_layout or enable_trees first, or collate separate rows"
        )
    if tree and micro.ids_BT.device.type == "cuda":  # before the layers, which may be compiled code
        tree.make_block_masks(read_windows(model.config))
    output = model.base_model(
        input_ids=micro.ids_BT,
        attention_mask=tree.no_mask() if tree else micro.attention_BT,
        position_ids=micro.position_BT,
        use_cache=False,
        **({"tree": tree} if tree else {}),
    )
    hidden_BTH = output.last_hidden_state
    hidden_PH = hidden_BTH.flatten(0, 1).index_select(0, micro.predictor_P)
    head = model.get_output_embeddings()
    softcap = getattr(model.config, "final_logit_softcapping", None)
    logp_P: Tensor = ChunkedLogp.apply(hidden_PH, head.weight, head.bias, micro.target_P, softcap)
    return logp_P


class LayoutError(ValueError):
    """Log-probabilities in a layout are not what each response gives alone."""

    def __init__(self, line: str, groups: Sequence[int]) -> None:
        super().__init__(line)
        self.groups = list(groups)  # places of those that differ, the furthest off first


def check_head(model: Any, ids_T: np.ndarray = SOME_IDS) -> None:
    """Raise ValueError unless hidden states times output embedding, capped as the config says, are the model's logits of some tokens.

    Some architectures scale their logits behind the head; log-probabilities computed here would be of another model. So would be
    what is saved of one that changes its weights as it computes (RWKV, which divides them in evaluation mode).
    """
    policy = as_policy(model)
    kind = policy.model.config.model_type
    head = policy.model.get_output_embeddings()
    if policy.model.base_model is policy.model:
        raise ValueError(
            f"model type {kind}: its hidden states cannot be had apart from its logits (no attribute {policy.model.base_model_prefix!r}); not supported"
        )
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"model type {kind}: output head is {type(head).__name__}; expected a linear layer; not supported"
        )
    parameters = list(policy.parameters())
    versions = [parameter._version for parameter in parameters]
    gap, bound = policy(compare_logits, ids_T)
    if versions != [parameter._version for parameter in parameters]:
        raise ValueError(
            f"model type {kind}: a forward pass changes its weights; expected them to stay; what is saved would be another model; "
            "this architecture is not supported"
        )
    if not math.isfinite(gap):
        raise ValueError(
            f"model type {kind}: got NaN or infinite logits; expected finite ones; its weights are broken, or too large for this precision"
        )
    if not gap <= bound:
        raise ValueError(
            f"model type {kind}: its logits differ by {gap:.3g} from hidden states times output embedding (scaled "
            "logits); expected equal ones; this architecture is not supported"
        )


def compare_logits(model: Any, ids_T: np.ndarray) -> tuple[float, float]:
    """Return how far a model's logits of some ids are from hidden states times output embedding, and how far they may be."""
    head = model.get_output_embeddings()
    ids_BT = torch.from_numpy(ids_T.astype(np.int64))[None].to(head.weight.device)
    with torch.no_grad():
        expected = model(input_ids=ids_BT, use_cache=False).logits
        got = head(model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state)
        if softcap := getattr(model.config, "final_logit_softcapping", None):
            got = softcap * torch.tanh(got / softcap)
    return (expected - got).abs().max().item(), 1e-4 * max(1.0, expected.abs().max().item())


def choose_groups(groups: Iterable[Sequence[Rendered]]) -> list[Sequence[Rendered]]:
    """Return what shows a layout's faults, of the responses of some prompts: the shortest group and the two longest, of each the
    longest responses, enough of them for one to see another."""
    ordered = sorted(groups, key=longest_of)
    chosen = ordered[:1] + ordered[1:][-2:]
    return [sorted(group, key=lambda sample: -len(sample.ids_T))[:SIBLINGS] for group in chosen]


def longest_of(group: Sequence[Rendered]) -> int:
    """Return the tokens of a prompt with its longest response."""
    return max(len(sample.ids_T) for sample in group)


def check_layout(
    model: Any,
    groups: Sequence[Sequence[Rendered]],
    *,
    layout: Layout,
    device: torch.device,
    dtype: torch.dtype | None = None,
    narrow: bool = False,
) -> None:
    """Make a model ready for a layout. LayoutError unless log-probabilities in it are what each response gives alone.

    `dtype` is what the layers compute in, where it is not that of the parameters; with `narrow` all is looked at under bfloat16 autocast
    too. `groups` are the responses of some prompts; longer ones show more, as with windows of attention, and a short one beside them
    shows positions that depend on the longest.
    """
    samples = [sample for group in groups for sample in group]
    group_B = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    policy = as_policy(model)
    modes = {dtype or next(model.parameters()).dtype: False} | ({torch.bfloat16: True} if narrow else {})

    def read(batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Return logp_P of all batches in each mode."""
        found: list[Tensor] = []
        for cast in modes.values():
            with torch.autocast(device.type, dtype=torch.bfloat16) if cast else nullcontext():
                found.append(torch.cat([policy(trained_logps, micro) for micro in batches]))
        return found

    with torch.no_grad():
        alone = read([collate([sample], device=device) for sample in samples])
        if layout == Layout.tree:
            enable_trees(policy.model)
        together = read([lay_out(samples, group_B, device=device, layout=layout)])
    group_P = np.repeat(group_B, [sample.num_trained for sample in samples])
    for mode, got_P, expected_P in zip(modes, together, alone, strict=True):
        # What is no number alone says nothing of the layout: who reads it names its rows.
        known_P = expected_P.isfinite()
        gap_P = (got_P - expected_P)[known_P].abs().cpu().numpy()
        require_small(gap_P, group_P[known_P.cpu().numpy()], mode, kind=policy.model.config.model_type, layout=layout)


def require_small(gap_P: np.ndarray, group_P: np.ndarray, dtype: torch.dtype, *, kind: str, layout: Layout) -> None:
    """Raise LayoutError unless the gaps of log-probabilities in a layout, of some groups, are small on average and one by one."""
    bound = MAX_LAYOUT_GAP[dtype]

    def is_small(gap_P: np.ndarray) -> bool:  # not "none is above": NaN is not small
        return not len(gap_P) or bool(gap_P.mean() <= bound and gap_P.max() <= ONE_TOKEN * bound)

    if not is_small(gap_P):
        gap, most = gap_P.mean(), gap_P.max()
        mean_of = {group: gap_P[group_P == group].mean() for group in np.unique(group_P).tolist()}
        off = [group for group in mean_of if not is_small(gap_P[group_P == group])]
        remedy = (
            "its attention cannot be shared: set runtime.layout to rows"
            if layout == Layout.tree
            else "what it computes depends on the longest row beside it (dynamic RoPE, say): lower max_tokens until no row is that long"
        )
        raise LayoutError(
            f"model type {kind}, layout {layout.value}, {str(dtype).removeprefix('torch.')}: log-probabilities differ by {gap:.3g} nats per token "
            f"from those of each response alone, that of one token by {most:.3g}; expected at most {bound:g} and {ONE_TOKEN * bound:g}; {remedy}",
            sorted(off, key=lambda group: -np.nan_to_num(mean_of[group], nan=np.inf)),
        )


class ChunkedLogp(torch.autograd.Function):
    """log softmax(hidden W^T + b)[target] for each position, chunk by chunk, whose logits the backward pass computes again: all but the last
    one's, with which it begins."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_PH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        target_P: Tensor,
        softcap: float | None = None,
    ) -> Tensor:
        kind = hidden_PH.device.type
        ctx.softcap = softcap
        ctx.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_PH.dtype
        with torch.autocast(kind, enabled=False):
            matrix_VH = weight_VH.to(ctx.dtype)
            logz_P = hidden_PH.new_empty(len(target_P), dtype=widen(ctx.dtype))
            logp_P = torch.empty_like(logz_P)
            pick = compile_on(kind, pick_logps)
            for rows in chunks(len(target_P), vocabulary=len(matrix_VH), kind=kind):
                logits_CV = hidden_PH[rows].to(ctx.dtype) @ matrix_VH.T
                fix_vocabulary(logits_CV)
                logz_P[rows], logp_P[rows] = pick(logits_CV, bias_V, target_P[rows], softcap)
        finished_in_place = logits_CV.dtype == widen(ctx.dtype) and not (bias_V is None and softcap is None)
        ctx.last_CV = None if finished_in_place else logits_CV
        ctx.save_for_backward(hidden_PH, weight_VH, bias_V, target_P, logz_P)
        return logp_P

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        hidden_PH, weight_VH, bias_V, target_P, logz_P = ctx.saved_tensors
        matrix_VH = weight_VH.to(ctx.dtype)
        grad_hidden_PH = torch.empty_like(hidden_PH)
        learns = ctx.needs_input_grad[1]  # not beside an adapter
        grad_weight_VH = torch.zeros_like(weight_VH) if learns else None
        grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V)
        kind = hidden_PH.device.type
        differentiate = compile_on(kind, differentiate_logps)
        for rows in reversed(chunks(len(target_P), vocabulary=len(matrix_VH), kind=kind)):
            hidden_CH = hidden_PH[rows].to(ctx.dtype)
            logits_CV = hidden_CH @ matrix_VH.T if ctx.last_CV is None else ctx.last_CV
            ctx.last_CV = None  # it is overwritten
            fix_vocabulary(logits_CV)
            grad_CV, bias_share_V = differentiate(
                logits_CV, bias_V, target_P[rows], logz_P[rows], grad_P[rows], ctx.softcap
            )
            if grad_bias_V is not None:
                grad_bias_V += bias_share_V
            grad_hidden_PH[rows] = (grad_CV @ matrix_VH).to(grad_hidden_PH.dtype)
            if grad_weight_VH is not None:
                add_product(grad_weight_VH, grad_CV.T, hidden_CH)
        return grad_hidden_PH, grad_weight_VH, grad_bias_V, None, None


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


def pick_logps(
    logits_CV: Tensor, bias_V: Tensor | None, target_C: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Return (logz_C, logp_C) of what the head gave, which is overwritten where it is wide enough."""
    logits_CV = finish_logits(logits_CV, bias_V, softcap)
    logz_C = logits_CV.logsumexp(dim=1)
    return logz_C, logits_CV.gather(1, target_C[:, None]).squeeze(1) - logz_C


def differentiate_logps(
    logits_CV: Tensor, bias_V: Tensor | None, target_C: Tensor, logz_C: Tensor, grad_C: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Return (gradient of what the head gave, of its bias): d logp / d logits = onehot(target) - softmax.

    It is written over the logits, to hold one chunk only; that of the targets apart, which compiled code writes once more.
    """
    dtype, target_C1 = logits_CV.dtype, target_C[:, None]
    logits_CV = finish_logits(logits_CV, bias_V, softcap)
    # d cap tanh(z / cap) / dz = 1 - tanh^2
    slope_CV = None if softcap is None else 1.0 - (logits_CV / softcap).square_()
    wide_CV = logits_CV.sub_(logz_C[:, None]).exp_().mul_(-grad_C[:, None])
    wide_C1 = wide_CV.gather(1, target_C1) + grad_C[:, None]
    if slope_CV is not None:
        wide_CV, wide_C1 = wide_CV.mul_(slope_CV), wide_C1 * slope_CV.gather(1, target_C1)
    bias_V = None if bias_V is None else wide_CV.scatter(1, target_C1, wide_C1).sum(dim=0)
    return wide_CV.to(dtype).scatter_(1, target_C1, wide_C1.to(dtype)), bias_V


def finish_logits(logits_CV: Tensor, bias_V: Tensor | None, softcap: float | None) -> Tensor:
    """Return logits in float32 or wider, with the head's bias, capped at +-softcap where the model does so."""
    logits_CV = logits_CV.to(widen(logits_CV.dtype))
    if bias_V is not None:
        logits_CV.add_(bias_V)
    return logits_CV if softcap is None else logits_CV.div_(softcap).tanh_().mul_(softcap)


def widen(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which the log-softmax of logits of a type runs."""
    return torch.promote_types(dtype, torch.float32)


def chunks(count: int, *, vocabulary: int, kind: str) -> list[slice]:
    """Return slices over `count` positions, each with at most CHUNK_ELEMENTS logits: the last one, which is kept, with as many as any."""
    size = max(1, CHUNK_ELEMENTS[kind] // vocabulary)
    return [slice(max(0, end - size), end) for end in range(count, 0, -size)][::-1]
