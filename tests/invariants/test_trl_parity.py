"""SFT and DPO against TRL: its own trainers' losses and gradients on the same models and token ids, both models in float64.

TRL takes its log-softmax in float32 whatever the model computes in, and then sums of tens of nats agree to some 1e-6. So each loss
is compared twice: as TRL computes it, and on log-probabilities of a plain float64 log-softmax in place of TRL's head.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from training.data.batch import collate
from training.data.examples import Example
from training.logprobs import sum_logps
from training.objectives.dpo import Dpo
from training.objectives.sft import Sft
from training.render import Rendered

SETTINGS: dict[str, Any] = {
    "use_cpu": True, "bf16": False, "report_to": [], "gradient_checkpointing": False, "max_length": None,
    "disable_tqdm": True,
}  # fmt: skip
USER, GOOD, BAD = (
    [{"role": role, "content": text}] for role, text in (("user", "a"), ("assistant", "b"), ("assistant", "c"))
)


@pytest.fixture
def policy(tiny_policy: Path) -> Any:
    """The tiny policy in float64."""
    return AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float64).eval()


@pytest.fixture
def reference(tiny_policy: Path) -> Any:
    """Another model, so that implicit rewards are not zero."""
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float64).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture
def examples(policy: Any, reference: Any) -> list[Example]:
    """Six prompts with three responses each, of unequal lengths, and their log-probabilities under the reference."""
    rng = np.random.default_rng(0)
    made = []
    for row in range(6):
        prompt = rng.integers(4, policy.config.vocab_size, size=rng.integers(2, 9))
        samples = tuple(
            Rendered(np.r_[prompt, rng.integers(4, policy.config.vocab_size, size=size)].astype(np.int32), len(prompt))
            for size in rng.integers(1, 15, size=3)
        )
        micro = collate(samples, device=torch.device("cpu"))
        with torch.no_grad():
            logp_ref = sum_logps(reference, micro).numpy()
        made.append(
            Example(
                row_id=f"row{row}",
                samples=samples,
                places=(0, 1, 2),
                num_responses=3,
                num_tokens_K=np.array([sample.num_trained for sample in samples]),
                logp_ref_K=logp_ref,
            )
        )
    return made


class Wide:
    """A model as TRL's losses call it, with a plain log-softmax in float64."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, *, labels: torch.Tensor, fused_lm_head: bool, **inputs: Any) -> FusedCausalLMOutput:
        assert fused_lm_head
        logits_BTV = self._model(**inputs).logits[:, :-1]
        target_BT, trained_BT = labels[:, 1:].clamp(min=0), labels[:, 1:] != -100
        logp_BTV = logits_BTV.log_softmax(-1)
        assert logp_BTV.dtype == torch.float64
        return FusedCausalLMOutput(
            log_probs=logp_BTV.gather(-1, target_BT[..., None]).squeeze(-1).masked_fill(~trained_BT, 0),
            entropy=-(logp_BTV.exp() * logp_BTV).sum(-1),
            mean_logits=logits_BTV.mean(-1),
            is_top1=logits_BTV.argmax(-1) == target_BT,
            label_mask=trained_BT,
        )


HEADS: list[tuple[Callable[[Any], Any], float]] = [(lambda model: model, 1e-5), (Wide, 1e-9)]


def split(sample: Rendered) -> tuple[list[int], list[int]]:
    """Return the ids of prompt and response."""
    return sample.ids_T[: sample.start].tolist(), sample.ids_T[sample.start :].tolist()


def first(example: Example, count: int) -> Example:
    """Return an example with its first responses alone."""
    assert example.logp_ref_K is not None
    return dataclasses.replace(
        example,
        samples=example.samples[:count],
        places=example.places[:count],
        num_tokens_K=example.num_tokens_K[:count],
        logp_ref_K=example.logp_ref_K[:count],
    )


def dpo_trainer(tiny_policy: Path, tmp_path: Path, policy: Any, reference: Any, **settings: Any) -> DPOTrainer:
    return DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(output_dir=str(tmp_path), **SETTINGS, **settings),
        train_dataset=Dataset.from_list([{"prompt": USER, "chosen": GOOD, "rejected": BAD}]),
        processing_class=AutoTokenizer.from_pretrained(tiny_policy),
    )


def trl_pairs(trainer: DPOTrainer, examples: list[Example]) -> dict[str, Any]:
    """Return TRL's batch of every (chosen, rejected) pair, the first response against each other."""
    pairs = []
    for example in examples:
        prompt, chosen = split(example.samples[0])
        pairs += [
            {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": split(sample)[1]}
            for sample in example.samples[1:]
        ]
    batch: dict[str, Any] = trainer.data_collator(pairs)
    return batch


def assert_same(ours: tuple[float, dict[str, torch.Tensor]], theirs: torch.Tensor, model: Any, *, bound: float) -> None:
    """Bound the difference of the losses, and of the gradients relative to the largest."""
    loss, gradients = ours
    model.zero_grad()
    theirs.backward()
    assert loss == pytest.approx(theirs.item(), abs=bound)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    scale = max(gradient.abs().max() for gradient in expected.values())
    assert scale > 0
    assert max((gradients[name] - gradient).abs().max() for name, gradient in expected.items()) <= bound * scale


@pytest.mark.parametrize(("head", "bound"), HEADS)
@pytest.mark.parametrize("num_responses", [2, 3])
@pytest.mark.usefixtures("wide_norm")
def test_dpo_is_trls(
    head: Callable[[Any], Any],
    bound: float,
    num_responses: int,
    tiny_policy: Path,
    tmp_path: Path,
    policy: Any,
    reference: Any,
    examples: Any,
    accumulate: Any,
) -> None:
    """With K responses TRL sees K - 1 pairs a prompt; as many of each prompt, their mean is the mean of the prompts' means."""
    chosen = [first(example, num_responses) for example in examples]
    ours = accumulate(policy, chosen, Dpo(beta=0.3))
    assert abs(ours[0] - np.log(2)) > 0.05  # it is not where every DPO loss starts
    trainer = dpo_trainer(tiny_policy, tmp_path, policy, reference, beta=0.3)
    trainer.ref_model = head(reference)
    theirs = trainer.compute_loss(head(policy), trl_pairs(trainer, chosen))
    assert_same(ours, theirs, policy, bound=bound)


@pytest.mark.parametrize("beta", [0.01, 1.0, 5.0])
@pytest.mark.usefixtures("wide_norm")
def test_dpo_is_trls_at_any_beta(
    beta: float, tiny_policy: Path, tmp_path: Path, policy: Any, reference: Any, examples: Any, accumulate: Any
) -> None:
    """From nearly linear to nearly saturated."""
    chosen = [first(example, 2) for example in examples]
    ours = accumulate(policy, chosen, Dpo(beta=beta))
    trainer = dpo_trainer(tiny_policy, tmp_path, policy, reference, beta=beta)
    trainer.ref_model = Wide(reference)
    assert_same(ours, trainer.compute_loss(Wide(policy), trl_pairs(trainer, chosen)), policy, bound=1e-9)


def test_the_figures_of_dpo_are_trls(
    tiny_policy: Path, tmp_path: Path, policy: Any, reference: Any, examples: Any, figures_of: Any
) -> None:
    pairs = [first(example, 2) for example in examples]
    ours = figures_of(policy, pairs, Dpo(beta=0.3))
    trainer = dpo_trainer(tiny_policy, tmp_path, policy, reference, beta=0.3)
    with torch.no_grad():
        trainer.compute_loss(policy, trl_pairs(trainer, pairs))
    metrics = next(kept for kept in trainer._metrics.values() if kept)
    names = [name for name in ours if name.startswith("rewards/")]
    assert len(names) == 4
    for name in names:
        assert ours[name] == pytest.approx(metrics[name][0], abs=1e-5)


@pytest.mark.usefixtures("wide_norm")
def test_label_smoothing_is_trls(
    tiny_policy: Path, tmp_path: Path, policy: Any, reference: Any, examples: Any, accumulate: Any
) -> None:
    """TRL's `sigmoid` ignores label_smoothing; its `aot` has it, and over a single pair, where nothing is sorted, it is DPO."""
    trainer = dpo_trainer(tiny_policy, tmp_path, policy, reference, beta=0.3, loss_type=["aot"], label_smoothing=0.2)
    trainer.ref_model = Wide(reference)
    for example in examples:
        pair = [first(example, 2)]
        ours = accumulate(policy, pair, Dpo(beta=0.3, label_smoothing=0.2))
        theirs = trainer.compute_loss(Wide(policy), trl_pairs(trainer, pair))
        assert_same(ours, theirs, policy, bound=1e-9)


@pytest.mark.parametrize(("head", "bound"), HEADS)
@pytest.mark.parametrize("num_responses", [1, 3])
@pytest.mark.usefixtures("wide_norm")
def test_sft_is_trls(
    head: Callable[[Any], Any],
    bound: float,
    num_responses: int,
    tiny_policy: Path,
    tmp_path: Path,
    policy: Any,
    examples: Any,
    accumulate: Any,
) -> None:
    """On a batch that is the whole data set N * Tbar is the number of trained tokens, by which TRL divides."""
    chosen = [first(example, num_responses) for example in examples]
    ours = accumulate(policy, chosen, Sft())
    trainer = SFTTrainer(
        model=policy,
        args=SFTConfig(output_dir=str(tmp_path), **SETTINGS, completion_only_loss=True),
        train_dataset=Dataset.from_list([{"prompt": USER, "completion": GOOD}]),
        processing_class=AutoTokenizer.from_pretrained(tiny_policy),
    )
    ids = [split(sample) for example in chosen for sample in example.samples]
    rows = [{"input_ids": p + c, "labels": [-100] * len(p) + c} for p, c in ids]
    theirs = trainer.compute_loss(head(policy), trainer.data_collator(rows))
    assert_same(ours, theirs, policy, bound=bound)
