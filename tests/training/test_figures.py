"""The figures of a step, loss and gradient among them, worked out by hand on five responses and held to the real steps and loop."""

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.architectures import make_model
from tests.training.test_logprobs import plain_logps
from tests.training.test_loop import settings
from tests.training.test_tree import make_group
from training import loop
from training.checkpoint import Progress
from training.config import Layout, ResponseRegime, Runtime
from training.data.examples import Example
from training.job import Job
from training.logprobs import check_layout
from training.loop import Trainer, make_optimiser
from training.objectives.objective import Columns, FloatArray, Objective
from training.objectives.sft import Sft
from training.objectives.var import Normaliser, ReferenceFactor, Var
from training.steps import Forwarded, Steps
from training.train import PolicyForward

TOKENS = (1, 2, 3, 4, 5)  # trained ones; prompts have two more
LOGP = (-2.0, -3.0, -4.0, -1.0, -6.0)
LOG2, LOG3 = math.log(2), math.log(3)
# pi_ref exp(r): 1/2 and 3/8, so w = 2 (4/7, 3/7), against the reward; then 1/2, 1/4, 1/4, so w = 3 (1/2, 1/4, 1/4), with it
REWARDS = ([0.0, LOG3], [LOG2, 0.0, 0.0])
LOGP_REF = ([-LOG2, -3 * LOG2], [-2 * LOG2] * 3)
WEIGHTS = (8 / 7, 6 / 7, 1.5, 0.75, 0.75)


class Told:
    """A policy that is its five log-probabilities; a sample is its place among them."""

    value = "logp"

    def identity(self, sample: int) -> bytes:
        return bytes([sample])

    def cut(
        self, samples: Sequence[int], group_R: np.ndarray, *, budget: int, whole_groups: bool, ranks: int = 1
    ) -> list[list[int]]:
        return [list(range(len(samples)))[begin : begin + budget] for begin in range(0, len(samples), budget)]

    def load(self, samples: Sequence[int], group_B: np.ndarray) -> list[int]:
        return list(samples)

    def values(self, model: Any, micro: list[int], slope_B: Any = None) -> Forwarded:
        sizes = [2 + TOKENS[sample] for sample in micro]
        return Forwarded(model.weight[micro].double(), sum(sizes), len(sizes) * max(sizes), flops=1000 * len(sizes))


def make_examples() -> list[Example]:
    return [
        Example(
            row_id=f"row{row}",
            samples=samples,
            places=tuple(range(len(samples))),
            num_responses=len(samples),
            num_tokens_K=np.array([TOKENS[sample] for sample in samples]),
            preferred=0,
            reward_K=np.array(REWARDS[row]),
            logp_ref_K=np.array(LOGP_REF[row]),
        )
        for row, samples in enumerate([(0, 1), (2, 3, 4)])
    ]


def take_step(
    model: nn.Module, examples: Sequence[Example], objective: Objective, forward: Any, job: Job, *, budget: int
) -> tuple[dict[str, float], Trainer]:
    work = Steps(examples, objective, forward, batch_prompts=len(examples), epochs=1, seed=0)
    optimiser = make_optimiser(model, settings())
    runtime = Runtime(microbatch_tokens=budget)
    trainer = Trainer(model, optimiser, work, settings(), runtime, job, Progress(), peak_flops=1e6)
    figures = trainer.take_step()
    assert figures is not None
    return {name.removeprefix("train/"): value for name, value in figures.items()}, trainer


@pytest.fixture
def job(make_job: Callable[..., Job]) -> Job:
    return make_job("train", "figures", config={}, inputs={})


@pytest.mark.parametrize(("budget", "padding"), [(5, 10 / 35), (1, 0.0)])
def test_every_figure_by_hand(job: Job, budget: int, padding: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """All in one micro-batch, and each response in its own: the same figures, but for padding and for time, of which a pass takes half a second."""
    clock = [0.0]

    class Timed(Told):
        def values(self, model: Any, micro: list[int], slope_B: Any = None) -> Forwarded:
            clock[0] += 0.5
            return super().values(model, micro)

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    objective = Var(
        lambda_=1.0,
        regime=ResponseRegime.support,
        normaliser=Normaliser.per_prompt,
        reference_factor=ReferenceFactor.sum,
    )
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor(LOGP))
    figures, _ = take_step(model, make_examples(), objective, Timed(), job, budget=budget)
    seconds = 0.5 * math.ceil(5 / budget)
    of_weights = sum(weight * -logp for weight, logp in zip(WEIGHTS, LOGP, strict=True))
    expected = {
        "loss": of_weights / (5 * 3),  # N responses of 3 tokens on average
        # The gradient of each log-probability is -w / (N Tbar): nothing reaches it through the weights.
        "grad_norm": math.sqrt(sum(weight**2 for weight in WEIGHTS)) / 15,
        "ess": (49 / 50 + 8 / 9) / 2,  # (16 + 9) / 49 is 25/49 of 2, 3/8 of 3
        "ess_collapsed": 0.0,
        "ess_batch": 5 / (100 / 49 + 27 / 8),  # 25 over five times the squares 64/49, 36/49, 9/4, 9/16, 9/16
        "weight_max": 4 / 7,
        "kl_weights": (4 / 7 * math.log(8 / 7) + 3 / 7 * math.log(6 / 7) + math.log(1.5) / 2 + math.log(0.75) / 2) / 2,
        "reward_tilt": (6 / 7 * LOG3 + 1.5 * LOG2) / 5 - (LOG3 + LOG2) / 5,
        "argmax_agreement": 0.5,
        "logp_ratio": (sum(LOGP) + 10 * LOG2) / 5,
        "logp_chosen": (-2.0 - 4.0) / 2,
        "logp_rejected": (-3.0 - 1.0 - 6.0) / 3,
        "logp_best": (-3.0 - 4.0) / 2,
        "padding_share": padding,
        "learning_rate": 0.1,
        "skipped": 0.0,
        "microbatch_tokens": budget,
        "tokens_per_second": 25 / seconds,
        "tflops_per_second": 5000 / seconds / 1e12,
        "flop_share": 5000 / seconds / 1e6,  # of a device that does 1e6 operations a second
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert figures.keys() == expected.keys() | {"memory_gib", "peak_memory_gib"}
    assert 0 < figures["memory_gib"] <= figures["peak_memory_gib"]


@pytest.mark.parametrize(("weight", "words"), [(0.0, "all are zero"), (math.nan, "got NaN"), (-1.0, "negative")])
def test_weights_that_train_nothing_end_the_run_before_it_begins(weight: float, words: str) -> None:
    class Fixed(Sft):
        def weigh(self, columns: Columns) -> FloatArray:
            return np.full(len(columns.group_R), weight)

    with pytest.raises(ValueError, match=rf"weights of step 0 \(rows row\d, row\d\): .*{words}"):
        Steps(make_examples(), Fixed(), Told(), batch_prompts=2, epochs=1, seed=0)


@pytest.mark.parametrize(("layout", "padding"), [(Layout.rows, 1 - 28 / 44), (Layout.tree, 0.0)])
def test_padding_and_log_probabilities_are_told_of_what_went_through_a_policy(
    job: Job, layout: Layout, padding: float
) -> None:
    """Rows of which 5, 7, 11 and 5 tokens are read fill 28 of four times 11; trees fill all they have. The responses' means are the stock model's."""
    rng = np.random.default_rng(0)
    groups = [make_group(rng, 4, 2, 4), make_group(rng, 5, 7, 1)]
    examples = [
        Example(
            row_id=f"row{row}",
            samples=tuple(samples),
            places=(0, 1),
            num_responses=2,
            num_tokens_K=np.array([sample.num_trained for sample in samples]),
            preferred=row,
        )
        for row, samples in enumerate(groups)
    ]
    with torch.no_grad():
        logp_R = plain_logps(make_model("llama"), [sample for group in groups for sample in group]).tolist()
    model = make_model("llama")
    check_layout(model, groups, layout=layout, device=torch.device("cpu"))
    figures, _ = take_step(model, examples, Sft(), PolicyForward(torch.device("cpu"), layout), job, budget=1000)
    assert figures["padding_share"] == pytest.approx(padding)
    assert figures["logp_chosen"] == pytest.approx((logp_R[0] + logp_R[3]) / 2, abs=1e-4)
    assert figures["logp_rejected"] == pytest.approx((logp_R[1] + logp_R[2]) / 2, abs=1e-4)
    assert figures["loss"] == pytest.approx(-sum(logp_R) / 14, abs=1e-5)
