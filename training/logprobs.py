"""Summed log-probabilities of responses, with logits only where a trained token is predicted: hidden states are gathered before the output head
(training/head.py). And what a model is held to before its log-probabilities count."""

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
from training.head import ChunkedLogp, Head, WeightedLogp
from training.render import Rendered
from training.tree import ATTENTION, enable_trees, send

# B sequences, T tokens, P positions that predict a trained token, H hidden, V vocabulary

MAX_LAYOUT_GAP = {
    torch.float64: 1e-6,
    torch.float32: 1e-4,
    torch.bfloat16: 3e-2,
}  # nats per token; a wrong mask is far off
# How many times the mean one token may be off: in bfloat16 0.9 nats, of the seven families in tests/architectures.py 0.03 at most.
ONE_TOKEN = 30
SIBLINGS = 2  # of a prompt's responses, that a layout is tried on
SOME_IDS = np.arange(6)  # that a model has, whatever its tokenizer


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
    return sum_samples(as_policy(model)(trained_logps, micro), micro)


def weigh_logps(model: Any, micro: MicroBatch, slope_B: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return (sum_B slope_B logp_B, logp_B), as `sum_logps` and float64; the sum is differentiable, log-probabilities are numbers alone."""
    slope_P = send(np.repeat(slope_B, micro.trained), device=micro.ids_BT.device)
    weighted, logp_P = as_policy(model)(weighted_logps, micro, slope_P)
    return weighted, sum_samples(logp_P, micro)


def sum_samples(logp_P: Tensor, micro: MicroBatch) -> Tensor:
    """Return the sum over each sample's trained tokens, float64."""
    return torch.stack([part_P.sum() for part_P in logp_P.double().split(micro.trained)])


def trained_logps(model: Any, micro: MicroBatch) -> Tensor:
    """Return logp_P: the log-probability of every trained token of the micro-batch, sample after sample."""
    logp_P: Tensor = ChunkedLogp.apply(*run_trunk(model, micro))
    return logp_P


def weighted_logps(model: Any, micro: MicroBatch, slope_P: Tensor) -> tuple[Tensor, Tensor]:
    """Return (sum_P slope_P logp_P, logp_P) of every trained token; slope_P is float64, as the sum is."""
    weighted, logp_P = WeightedLogp.apply(slope_P, *run_trunk(model, micro))
    return weighted, logp_P


def run_trunk(model: Any, micro: MicroBatch) -> Head:
    """Return the output head over the hidden states that predict a trained token.

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
    hidden_PH = output.last_hidden_state.flatten(0, 1).index_select(0, micro.predictor_P)
    head = model.get_output_embeddings()
    softcap = getattr(model.config, "final_logit_softcapping", None)
    return Head(hidden_PH, head.weight, head.bias, micro.target_P, softcap)


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


def compare_gradients(model: Any, ids_T: np.ndarray) -> tuple[float, float]:
    """Return how far log-probabilities of some ids are, and the gradients of hidden states and of the head where it is trained, as the head gives
    them in training, from those that torch finds through the logits: relative to the largest of each."""
    head = model.get_output_embeddings()
    ids_BT = torch.from_numpy(ids_T.astype(np.int64))[None].to(head.weight.device)
    with torch.no_grad():
        hidden_PH = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state[0, :-1].clone()
    weight_VH: Tensor = head.weight.detach().requires_grad_(head.weight.requires_grad)
    bias_V = None if head.bias is None else head.bias.detach().requires_grad_(head.bias.requires_grad)
    softcap, target_P = getattr(model.config, "final_logit_softcapping", None), ids_BT[0, 1:]
    slope_P = torch.linspace(-1.0, 2.0, len(target_P), dtype=torch.float64, device=hidden_PH.device)
    hidden_PH.requires_grad_()
    learned = [part for part in (hidden_PH, weight_VH, bias_V) if part is not None and part.requires_grad]
    with torch.enable_grad():
        weighted, got_P = WeightedLogp.apply(slope_P, hidden_PH, weight_VH, bias_V, target_P, softcap)
        got = torch.autograd.grad(weighted, learned)
        logits_PV = nn.functional.linear(hidden_PH, weight_VH)
        logits_PV = logits_PV.to(torch.promote_types(logits_PV.dtype, torch.float32))
        if bias_V is not None:
            logits_PV = logits_PV + bias_V
        if softcap:
            logits_PV = softcap * torch.tanh(logits_PV / softcap)
        logp_P = logits_PV.log_softmax(dim=-1).gather(1, target_P[:, None]).squeeze(1)
        expected = torch.autograd.grad((slope_P * logp_P.double()).sum(), learned)

    def gap(one: Tensor, other: Tensor) -> float:
        return ((one - other).abs().max() / other.abs().max()).item()

    return gap(got_P, logp_P), max(map(gap, got, expected))


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
