"""What a step is must not depend on how many ranks share it. Real processes over gloo, compared before clipping and AdamW."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.invariants.conftest import SETTINGS, widen_norms
from tests.invariants.test_gradients import assert_close
from tests.ranks import Ranks
from training.checkpoint import Progress
from training.config import Layout, Precision, Runtime
from training.data.examples import Example
from training.distributed import ALONE, World
from training.job import Job
from training.logprobs import Policy
from training.loop import Trainer, make_optimiser
from training.model import prepare_layers
from training.objectives.dpo import Dpo
from training.objectives.objective import Objective
from training.objectives.var import Var
from training.sharding import shard_policy
from training.steps import Steps
from training.train import PolicyForward
from training.tree import enable_trees

NARROW = dataclasses.replace(SETTINGS, precision=Precision.bfloat16)


@dataclass
class Case:
    """One step of a model."""

    model: Any
    examples: Sequence[Example]
    objective: Objective
    budget: int
    folder: Path
    precision: Precision = Precision.float32
    layers: Runtime = field(default_factory=Runtime)  # how they run
    layout: Layout = Layout.tree


@dataclass
class Outcome:
    """What a rank saw of the step."""

    size: int
    sharded: list[bool]
    loss: float
    tokens: int
    figures: dict[str, float]
    gradients: dict[str, Tensor]
    norm: float
    skipped: int
    weights: dict[str, Tensor]


@contextmanager
def wide_norms() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        widen_norms(patch)
        yield


def take_step(world: World, case: Case) -> Outcome:
    """Run one step with the loop's own code, sharded where there are several ranks."""
    with wide_norms():
        policy = Policy(copy.deepcopy(case.model))
        if case.layout == Layout.tree:
            enable_trees(policy.model)
        prepare_layers(policy.model, case.layers, device=world.device)
        if world.size > 1:
            shard_policy(policy, world, precision=case.precision)
        forward = PolicyForward(world.device, case.layout)
        work = Steps(case.examples, case.objective, forward, batch_prompts=len(case.examples), epochs=1, seed=0)
        job = Job(name="train", config={}, runtime={}, inputs={}, output=case.folder, work=case.folder)
        runtime = Runtime(microbatch_tokens=case.budget)
        optimiser = make_optimiser(policy, SETTINGS)
        settings = SETTINGS if case.precision == Precision.float32 else NARROW
        trainer = Trainer(policy, optimiser, work, settings, runtime, job, Progress(), world)
        total = trainer.accumulate(0)
        assert total is not None
        sharded = [isinstance(p, DTensor) and isinstance(p.grad, DTensor) for p in policy.parameters()]
        gradients = {name: whole(p.grad).clone() for name, p in policy.named_parameters() if p.grad is not None}
        norm = trainer.update(0, total)
        weights = {name: whole(p.detach()).clone() for name, p in policy.named_parameters()}
    return Outcome(
        world.size,
        sharded,
        total.loss,
        total.num_tokens,
        total.figures,
        gradients,
        norm,
        trainer.progress.skipped,
        weights,
    )


@dataclass
class Trajectory:
    """What a rank saw of three steps."""

    norms: list[float]
    gradients: list[dict[str, Tensor]]  # as the optimiser got them
    weights: dict[str, Tensor]


def take_steps(world: World, case: Case, max_norm: float) -> Trajectory:
    """Run three clipped steps with the loop's own code."""
    with wide_norms():
        policy = Policy(copy.deepcopy(case.model))
        enable_trees(policy.model)
        if world.size > 1:
            shard_policy(policy, world, precision=case.precision)
        forward = PolicyForward(world.device, Layout.tree)
        work = Steps(case.examples, case.objective, forward, batch_prompts=3, epochs=1, seed=0)
        settings = dataclasses.replace(SETTINGS, max_grad_norm=max_norm, weight_decay=0.1)
        job = Job(name="train", config={}, runtime={}, inputs={}, output=case.folder, work=case.folder)
        optimiser = make_optimiser(policy, settings)
        gradients: list[dict[str, Tensor]] = []

        def keep(*_: Any) -> None:
            gradients.append({n: whole(p.grad).clone() for n, p in policy.named_parameters() if p.grad is not None})

        optimiser.register_step_pre_hook(keep)
        runtime = Runtime(microbatch_tokens=case.budget)
        trainer = Trainer(policy, optimiser, work, settings, runtime, job, Progress(), world)
        figures = [trainer.take_step() for _ in range(work.num_steps)]
        norms = [line["train/grad_norm"] for line in figures if line is not None]
        return Trajectory(norms, gradients, {n: whole(p.detach()).clone() for n, p in policy.named_parameters()})


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def count_micros(case: Case, *, size: int) -> int:
    work = Steps(
        case.examples, case.objective, PolicyForward(ALONE.device, Layout.tree), batch_prompts=9, epochs=1, seed=0
    )
    return len(work.cut(0, budget=case.budget, ranks=size))


@pytest.fixture
def make_case(make_model: Any, make_examples: Any, var_objective: Var, tmp_path: Path) -> Callable[..., Case]:
    def make(name: str = "llama", *, dtype: torch.dtype = torch.float64, budget: int = 30, rows: int = 8) -> Case:
        return Case(
            make_model(name, dtype=dtype), make_examples(rows, num_responses=3), var_objective, budget, tmp_path
        )

    return make


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("name", "size", "replicas"),
    [
        ("llama", 2, 1),
        ("llama", 4, 1),
        ("llama", 3, 1),
        ("gpt2", 2, 1),
        ("sliding", 4, 1),
        ("llama", 4, 2),
        ("llama", 2, 2),
    ],
)
def test_ranks_change_nothing(
    name: str, size: int, replicas: int, dtype: torch.dtype, bound: float, make_case: Callable[..., Case], ranks: Ranks
) -> None:
    case = make_case(name, dtype=dtype)
    expected = take_step(ALONE, case)
    for got in ranks.run(take_step, size=size, replicas=replicas, case=case):
        assert got.size == size and got.sharded and all(got.sharded)
        assert got.loss == pytest.approx(expected.loss, rel=bound)
        assert got.figures == pytest.approx(expected.figures, rel=bound, abs=bound)
        assert got.tokens == expected.tokens
        assert got.norm == pytest.approx(expected.norm, rel=bound)
        assert_close(got.gradients, expected.gradients, bound=bound)
        if dtype == torch.float64:  # AdamW makes much of a rounding of a small gradient
            assert_close(got.weights, expected.weights, bound=1e-6)


def test_clipping_scales_by_the_norm_of_all_ranks_together(make_case: Callable[..., Case], ranks: Ranks) -> None:
    """Three clipped steps on shards and on replicas of shards: norms, what AdamW gets of them, and the weights after."""
    case = make_case(rows=9)
    (first, *_), max_norm = take_steps(ALONE, case, max_norm=1e9).norms, 0.05
    alone = take_steps(ALONE, case, max_norm=max_norm)
    assert len(alone.norms) == 3 and alone.norms[0] == first and min(alone.norms) > 2 * max_norm
    for size, replicas in ((2, 1), (4, 1), (4, 2), (2, 2)):
        for got in ranks.run(take_steps, size=size, replicas=replicas, case=case, max_norm=max_norm):
            assert got.norms == pytest.approx(alone.norms, rel=1e-6)
            assert_close(got.gradients[0], alone.gradients[0], bound=1e-10)
            for clipped in got.gradients:
                total = sum(gradient.square().sum().item() for gradient in clipped.values()) ** 0.5
                assert total == pytest.approx(max_norm, rel=1e-4)
            assert_close(got.weights, alone.weights, bound=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_activation_checkpointing_changes_no_bit_on_ranks(
    dtype: torch.dtype, make_case: Callable[..., Case], ranks: Ranks
) -> None:
    case = make_case(dtype=torch.float64)
    if dtype == torch.bfloat16:
        case = dataclasses.replace(make_case(dtype=torch.float32), precision=Precision.bfloat16)
    expected = ranks.run(take_step, size=2, case=case)[0]
    for got in ranks.run(
        take_step, size=2, case=dataclasses.replace(case, layers=Runtime(activation_checkpointing=True))
    ):
        assert got.sharded and all(got.sharded)
        assert all(torch.equal(got.gradients[name], gradient) for name, gradient in expected.gradients.items())
        assert (got.loss, got.norm) == (expected.loss, expected.norm)


@pytest.mark.slow
def test_compiled_layers_are_sharded_as_others_are(make_case: Callable[..., Case], ranks: Ranks) -> None:
    case = make_case(dtype=torch.float32)
    expected = take_step(ALONE, case)
    compiled = dataclasses.replace(case, layers=Runtime(compile=True, activation_checkpointing=True))
    for got in ranks.run(take_step, size=2, case=compiled):
        assert got.sharded and all(got.sharded)
        assert got.loss == pytest.approx(expected.loss, rel=1e-5)
        assert_close(got.gradients, expected.gradients, bound=1e-5)


@pytest.mark.parametrize(("size", "budget", "micros"), [(2, 50, 3), (4, 60, 3), (4, 10_000, 3), (2, 1, 9)])
def test_uneven_shares_change_nothing(
    size: int, budget: int, micros: int, make_case: Callable[..., Case], ranks: Ranks
) -> None:
    """Ranks with nothing to do run along and add nothing; a step within one budget is work for as many as it has prompts."""
    case = make_case(budget=budget, rows=3)
    assert count_micros(case, size=size) == micros
    expected = take_step(ALONE, case)
    for got in ranks.run(take_step, size=size, case=case):
        assert (got.loss, got.tokens) == (pytest.approx(expected.loss, rel=1e-10), expected.tokens)
        assert_close(got.gradients, expected.gradients, bound=1e-10)


@pytest.mark.parametrize(("size", "replicas"), [(2, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize("budget", [1, 60])
def test_ranks_change_nothing_of_separate_rows(
    size: int, replicas: int, budget: int, make_case: Callable[..., Case], ranks: Ranks
) -> None:
    """What cannot share its prompts is padded instead, in the cut of each number of ranks; the numbers are those of trees."""
    trees = make_case(budget=budget, rows=5)
    case = dataclasses.replace(trees, layout=Layout.rows)
    expected = take_step(ALONE, trees)
    for got in (take_step(ALONE, case), *ranks.run(take_step, size=size, replicas=replicas, case=case)):
        assert got.loss == pytest.approx(expected.loss, rel=1e-10)
        assert got.figures == pytest.approx(expected.figures, rel=1e-10, abs=1e-10)
        assert_close(got.gradients, expected.gradients, bound=1e-10)


@pytest.mark.parametrize(("size", "rows"), [(2, 8), (4, 8), (4, 2)])
def test_ranks_change_nothing_of_dpo_whose_prompts_are_never_cut(
    size: int, rows: int, make_case: Callable[..., Case], ranks: Ranks
) -> None:
    """With fewer prompts than ranks too, where some have nothing to compare."""
    case = dataclasses.replace(make_case(rows=rows), objective=Dpo(beta=0.5, label_smoothing=0.1))
    expected = take_step(ALONE, case)
    assert expected.figures.keys() >= {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
    for got in ranks.run(take_step, size=size, case=case):
        assert (got.loss, got.tokens) == (pytest.approx(expected.loss, rel=1e-10), expected.tokens)
        assert got.figures == pytest.approx(expected.figures, rel=1e-10, abs=1e-10)
        assert_close(got.gradients, expected.gradients, bound=1e-10)


def test_bfloat16_on_ranks_is_bfloat16_on_one(make_case: Callable[..., Case], ranks: Ranks) -> None:
    """As near to one rank in bfloat16 as bfloat16 is to float32; gradients and weights stay float32."""
    exact = take_step(ALONE, make_case(dtype=torch.float32))
    case = dataclasses.replace(make_case(dtype=torch.float32), precision=Precision.bfloat16)
    expected = take_step(ALONE, case)
    rounding = max((expected.gradients[n] - exact.gradients[n]).abs().max().item() for n in exact.gradients)
    got, _ = ranks.run(take_step, size=2, case=case)
    assert {g.dtype for g in got.gradients.values()} == {torch.float32}
    gap = max((got.gradients[n] - expected.gradients[n]).abs().max().item() for n in exact.gradients)
    assert 0 < gap <= rounding


def test_all_ranks_skip_a_step_that_is_not_finite(make_case: Callable[..., Case], ranks: Ranks) -> None:
    case = make_case(rows=3)
    with torch.no_grad():
        case.model.get_output_embeddings().weight[0, 0] = float("nan")
    for got in ranks.run(take_step, size=2, case=case):
        assert got.skipped == 1
        before = {n: p.detach() for n, p in Policy(case.model).named_parameters()}
        assert all(torch.equal(got.weights[n].nan_to_num(9), p.nan_to_num(9)) for n, p in before.items())
