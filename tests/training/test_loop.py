"""The loop: schedule, decay groups, clipping, skipped steps; told of nothing but steps, parts and a scalar loss."""

import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from training.checkpoint import Progress
from training.config import Precision, Runtime, Schedule
from training.distributed import World
from training.job import Interrupted, Job, OutOfMemory
from training.loop import Part, Saving, Settings, Trainer, find_smaller, learning_rate, make_optimiser, run_steps


def settings(**changes: Any) -> Settings:
    base: dict[str, Any] = {
        "learning_rate": 0.1,
        "weight_decay": 0.0,
        "schedule": Schedule.constant,
        "warmup_fraction": 0.0,
        "max_grad_norm": 1e9,
        "precision": Precision.float32,
        "seed": 0,
    }
    return Settings(**{**base, **changes})


class Line:
    """Fit y = w x + b on four points in each step, squares summed and divided by four; `broken` steps give NaN."""

    def __init__(self, num_steps: int, *, broken: Sequence[int] = ()) -> None:
        self.num_steps = num_steps
        self._broken = broken

    def cut(self, step: int, *, budget: int, ranks: int) -> list[list[int]]:
        return [list(range(4))[i : i + budget] for i in range(0, 4, budget)]

    def load(self, step: int, members: Sequence[int]) -> tuple[int, Sequence[int]]:
        return step, members

    def part(self, model: Any, batch: tuple[int, Sequence[int]]) -> Part:
        step, members = batch
        x = torch.tensor([[float(m)] for m in members])
        loss = ((model(x) - 3 * x - 1) ** 2).sum() / 4
        return Part(
            loss * (math.nan if step in self._broken else 1.0), num_tokens=len(members), num_padded=2 * len(members)
        )

    def describe(self, step: int) -> dict[str, float]:
        return {"own": float(step)}

    def row_ids(self, step: int) -> list[str]:
        return [f"step{step}-row{n}" for n in range(2)]


def make_line() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(1, 1)


@pytest.fixture
def job(make_job: Callable[..., Job]) -> Job:
    return make_job("train", "loop", config={}, inputs={})


def run(model: nn.Module, work: Line, job: Job, *, budget: int = 4, **changes: Any) -> Progress:
    runtime = Runtime(microbatch_tokens=budget, checkpoint_every_steps=0)
    return run_steps(model, work, settings(**changes), job=job, runtime=runtime, identity={})


def test_it_trains_and_says_so(job: Job) -> None:
    model = make_line()
    progress = run(model, Line(300), job)
    assert (model.weight.item(), model.bias.item()) == (pytest.approx(3, abs=0.05), pytest.approx(1, abs=0.1))
    lines = [json.loads(line) for line in (job.output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 301))
    assert lines[7]["train/own"] == 7
    assert lines[0]["train/padding_share"] == 0.5
    assert (progress.tokens, progress.skipped) == (1200, 0)


def test_accumulation_is_a_sum(job: Job) -> None:
    losses, gradients = [], []
    for budget in (1, 3, 4):
        model = make_line()
        trainer = Trainer(
            model,
            make_optimiser(model, settings()),
            Line(1),
            settings(),
            Runtime(microbatch_tokens=budget),
            job,
            Progress(),
        )
        total = trainer.accumulate(0)
        assert total is not None
        losses.append(total.loss)
        gradients.append([p.grad.item() for p in model.parameters() if p.grad is not None])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert gradients[1] == pytest.approx(gradients[0], rel=1e-6) and gradients[2] == pytest.approx(
        gradients[0], rel=1e-6
    )


def test_learning_rate_by_hand() -> None:
    linear = settings(schedule=Schedule.linear, warmup_fraction=0.2)
    rates = [learning_rate(linear, step, num_steps=10) for step in range(10)]
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.0875, 0.075, 0.0625, 0.05, 0.0375, 0.025, 0.0125])
    cosine = [learning_rate(settings(schedule=Schedule.cosine), step, num_steps=4) for step in range(4)]
    assert cosine == pytest.approx([0.1, 0.05 * (1 + math.sqrt(0.5)), 0.05, 0.05 * (1 - math.sqrt(0.5))])
    assert {learning_rate(settings(), step, num_steps=4) for step in range(4)} == {0.1}
    assert learning_rate(settings(warmup_fraction=1.0), 9, num_steps=10) == pytest.approx(0.1)


def test_matrices_decay_norms_and_biases_do_not() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Embedding(4, 2))
    optimiser = make_optimiser(model, settings(weight_decay=0.3))
    assert optimiser.defaults["fused"] is True
    decay = {id(p): group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}
    got = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert got == {"0.weight": 0.3, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0, "2.weight": 0.3}


def test_gradients_are_clipped_to_the_norm(job: Job) -> None:
    model = make_line()
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        Line(1),
        settings(learning_rate=1.0, max_grad_norm=0.25),
        Runtime(),
        job,
        Progress(),
    )
    before = [p.item() for p in model.parameters()]
    figures = trainer.take_step()
    assert figures is not None and figures["train/grad_norm"] > 1
    moved = math.sqrt(sum((p.item() - b) ** 2 for p, b in zip(model.parameters(), before, strict=True)))
    assert moved == pytest.approx(0.25, rel=1e-4)


def test_a_step_that_is_not_finite_is_skipped_and_counted(job: Job) -> None:
    whole, broken = make_line(), make_line()
    progress = run(broken, Line(3, broken=[1]), job)
    assert progress.skipped == 1
    lines = [json.loads(line) for line in (job.output / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["train/loss_nonfinite"] == 1 and "train/loss" not in lines[1]
    assert [line["train/skipped"] for line in lines] == [0, 1, 1]
    assert all(torch.isfinite(p).all() for p in broken.parameters())
    (job.output / "metrics.jsonl").unlink()
    run(whole, Line(2), job)  # the same line, one step fewer and none broken
    assert [p.item() for p in whole.parameters()] == [p.item() for p in broken.parameters()]


class OneBroken(Line):
    """In the second step, of four micro-batches the third gives NaN."""

    def part(self, model: Any, batch: tuple[int, Sequence[int]]) -> Part:
        part = super().part(model, batch)
        step, members = batch
        return replace(part, loss=part.loss * math.nan) if (step, list(members)) == (1, [2]) else part


def test_one_micro_batch_that_is_not_finite_skips_its_step_whole_and_names_its_rows(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    whole, broken = make_line(), make_line()
    with caplog.at_level(logging.WARNING, logger="training.loop"):
        assert run(broken, OneBroken(3), job, budget=1).skipped == 1
    (told,) = (record.getMessage() for record in caplog.records)
    assert told.startswith("step 1: ") and told.endswith("its rows: step1-row0, step1-row1")
    (job.output / "metrics.jsonl").unlink()
    run(whole, Line(2), job, budget=1)
    assert [p.item() for p in whole.parameters()] == [p.item() for p in broken.parameters()]


def test_three_in_a_row_stop_the_run_and_name_the_rows(job: Job) -> None:
    with pytest.raises(ValueError, match=r"3 steps in a row.*step3-row0, step3-row1, step4-row0.*step5-row1; lower"):
        run(make_line(), Line(9, broken=[0, 1, 3, 4, 5]), job)


def test_a_gradient_that_is_not_finite_is_skipped_too(job: Job, tmp_path: Path) -> None:
    class Steep(Line):
        def part(self, model: Any, batch: tuple[int, Sequence[int]]) -> Part:
            root = model.weight.sum().sub(model.weight.detach().sum()).abs().sqrt()  # value 0, slope infinite
            return Part(root, num_tokens=1, num_padded=1)

    model = make_line()
    before = [p.clone() for p in model.parameters()]
    assert run(model, Steep(2), job).skipped == 2
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


class Told(Line):
    """The line, and in which order its micro-batches are loaded and its figures read."""

    def __init__(self, num_steps: int) -> None:
        super().__init__(num_steps)
        self.events: list[str] = []

    def load(self, step: int, members: Sequence[int]) -> tuple[int, Sequence[int]]:
        self.events.append(f"load {step}: {list(members)}")
        return super().load(step, members)

    def part(self, model: Any, batch: tuple[int, Sequence[int]]) -> Part:
        def figures() -> dict[str, float]:
            self.events.append(f"read {batch[0]}: {list(batch[1])}")
            return {}

        return replace(super().part(model, batch), figures=figures)


def test_the_next_step_is_begun_before_this_ones_figures_are_waited_for(job: Job) -> None:
    """So that a device has something to do meanwhile; every micro-batch is loaded once."""
    work = Told(num_steps=2)
    run(make_line(), work, job, budget=2)
    first, second = ["load 0: [0, 1]", "load 0: [2, 3]"], ["load 1: [0, 1]", "load 1: [2, 3]"]
    read = [[event.replace("load", "read") for event in events] for events in (first, second)]
    assert work.events == [*first, second[0], *read[0], second[1], *read[1]]


def test_nothing_waits_for_the_optimiser(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is read of a device behind it is there only when the weights are changed, and the device has nothing to do meanwhile."""
    work, model, events = Told(num_steps=2), make_line(), []
    trainer = Trainer(model, make_optimiser(model, settings()), work, settings(), Runtime(), job, Progress())
    apply, item = trainer.apply, torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: (events.append("read"), item(tensor))[1])
    monkeypatch.setattr(trainer, "apply", lambda step: (apply(step), events.append("applied")))
    trainer.take_step()
    assert "read" in events and events[-1] == "applied"


def test_what_was_begun_for_another_budget_is_begun_anew(job: Job) -> None:
    """As where held-out rows had no room between two steps."""
    work, model = Told(num_steps=2), make_line()
    runtime = Runtime(microbatch_tokens=4)
    trainer = Trainer(model, make_optimiser(model, settings()), work, settings(), runtime, job, Progress())
    trainer.take_step()
    trainer.shrink(2)
    trainer.take_step()
    loaded = [event for event in work.events if event.startswith("load 1")]
    assert loaded == ["load 1: [0, 1, 2, 3]", "load 1: [0, 1]", "load 1: [2, 3]"]


class Narrow(Line):
    """A device with room for so many points at once."""

    def __init__(self, num_steps: int, *, room: int) -> None:
        super().__init__(num_steps)
        self._room = room

    def part(self, model: Any, batch: tuple[int, Sequence[int]]) -> Part:
        part = super().part(model, batch)
        _, members = batch
        if len(members) > self._room:
            raise torch.OutOfMemoryError(f"tried to allocate {len(members)} points")
        return part


def test_a_step_without_room_is_taken_again_in_halves_and_the_run_goes_on_so(job: Job) -> None:
    roomy, narrow = make_line(), make_line()
    progress = run(narrow, Narrow(3, room=1), job)
    assert (progress.microbatch_tokens, progress.skipped, progress.tokens) == (1, 0, 12)
    lines = [json.loads(line) for line in (job.output / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/microbatch_tokens"] for line in lines] == [1, 1, 1]
    (job.output / "metrics.jsonl").unlink()
    assert run(roomy, Line(3), job, budget=1).microbatch_tokens == 1
    assert [p.item() for p in narrow.parameters()] == [p.item() for p in roomy.parameters()]


class Halting(Line):
    """Tells the job to stop after so many steps."""

    def __init__(self, num_steps: int, job: Job, *, after: int, broken: Sequence[int] = ()) -> None:
        super().__init__(num_steps, broken=broken)
        self._job, self._after = job, after

    def describe(self, step: int) -> dict[str, float]:
        if step + 1 == self._after:
            self._job.stop.set()
        return super().describe(step)


def read_rates(job: Job) -> list[float]:
    return [json.loads(line)["train/learning_rate"] for line in (job.output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("after", [2, 6])
def test_a_resumed_run_goes_on_with_the_schedule_where_it_stopped(job: Job, after: int) -> None:
    """Within the warm-up and behind it: the logged rates, and so the weights, are those of a run that never stopped."""
    plan: dict[str, Any] = {"schedule": Schedule.cosine, "warmup_fraction": 0.4, "learning_rate": 0.3}
    expected = [learning_rate(settings(**plan), step, num_steps=10) for step in range(10)]
    whole, halted = make_line(), make_line()
    run(whole, Line(10), job, **plan)
    assert read_rates(job) == pytest.approx(expected)
    (job.output / "metrics.jsonl").unlink()
    with pytest.raises(Interrupted):
        run(halted, Halting(10, job, after=after), job, **plan)
    assert read_rates(job) == pytest.approx(expected[:after])
    job.stop.clear()
    resumed = make_line()
    run(resumed, Line(10), job, **plan)
    assert read_rates(job) == pytest.approx(expected)
    assert [p.item() for p in resumed.parameters()] == [p.item() for p in whole.parameters()]


def test_steps_that_are_skipped_in_a_row_are_counted_on_over_a_resume(job: Job) -> None:
    """Stopped between the second and the third: the third ends the run and names the rows of all, a whole one in its place does not."""
    with pytest.raises(Interrupted):
        run(make_line(), Halting(9, job, after=3, broken=[1, 2]), job)
    assert read_skipped(job) == [0, 1, 2]
    job.stop.clear()
    with pytest.raises(ValueError, match=r"^step 3: .*in 3 steps in a row") as ended:
        run(make_line(), Line(9, broken=[1, 2, 3]), job)
    assert "rows of these steps: step1-row0, step1-row1, step2-row0, step2-row1, step3-row0, step3-row1;" in str(
        ended.value
    )
    assert read_skipped(job) == [0, 1, 2]
    assert run(make_line(), Line(9, broken=[1, 2, 4, 5]), job).skipped == 4
    assert read_skipped(job) == [0, 1, 2, 2, 3, 4, 4, 4, 4]


def read_skipped(job: Job) -> list[float]:
    return [json.loads(line)["train/skipped"] for line in (job.output / "metrics.jsonl").read_text().splitlines()]


class NarrowHalting(Halting):
    """A device with room for two points; counts how often there was none, and stops after a step."""

    without_room = 0

    def part(self, model: Any, batch: tuple[int, Sequence[int]]) -> Part:
        _, members = batch
        if len(members) > 2:
            self.without_room += 1
            raise torch.OutOfMemoryError(f"tried to allocate {len(members)} points")
        return super().part(model, batch)


def test_a_budget_that_was_halved_stays_so_in_the_next_attempt_unless_another_is_asked_for(job: Job) -> None:
    first, second, third = (NarrowHalting(9, job, after=after) for after in (2, 4, 6))
    for work, budget, halvings in ((first, 4, 1), (second, 4, 0), (third, 3, 1)):
        job.stop.clear()
        with pytest.raises(Interrupted):
            run(make_line(), work, job, budget=budget)
        assert work.without_room == halvings
    lines = [json.loads(line) for line in (job.output / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/microbatch_tokens"] for line in lines] == [2, 2, 2, 2, 1, 1]


def test_what_has_no_room_alone_is_an_error_that_says_so(job: Job) -> None:
    with pytest.raises(torch.OutOfMemoryError, match=r"step 0.*no room.*lower max_tokens"):
        run(make_line(), Narrow(3, room=0), job)


def test_held_out_rows_without_room_are_looked_at_in_halves_to_the_same_loss(job: Job) -> None:
    """And training goes on with the smaller budget, as after a step of its own."""
    losses = []
    for heldout in (Line(1), Narrow(1, room=1)):
        runtime = Runtime(microbatch_tokens=4, checkpoint_every_steps=0, heldout_every_steps=1)
        progress = run_steps(make_line(), Line(2), settings(), job=job, runtime=runtime, identity={}, heldout=heldout)
        lines = [json.loads(line) for line in (job.output / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["heldout/loss"] for line in lines])
        (job.output / "metrics.jsonl").unlink()
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert [line["train/microbatch_tokens"] for line in lines] == [4, 1] and progress.microbatch_tokens == 1
    with pytest.raises(torch.OutOfMemoryError, match=r"held-out rows after 1 steps, rank 0 of 1: .*lower max_tokens"):
        run_steps(make_line(), Line(2), settings(), job=job, runtime=runtime, identity={}, heldout=Narrow(1, room=0))


def test_an_optimiser_without_room_is_an_error_that_says_so_and_no_step_is_taken_again(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0

    def step(self: Any) -> None:
        nonlocal steps
        steps += 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(
        torch.OutOfMemoryError,
        match=r"step 0, rank 0 of 1: .*moments of 2 trained parameters \(CUDA out of memory\).*raise runtime.ranks",
    ):
        run(make_line(), Line(2), job)
    assert steps == 1


def test_one_of_several_ranks_without_room_asks_all_for_smaller_micro_batches() -> None:
    """It does not go on alone, which would leave the others waiting for it."""
    second = World(torch.device("cpu"), rank=1, size=2)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of")
    with pytest.raises(
        OutOfMemory,
        match=r"step 7, rank 1 of 2: .*no room.* of at most 3 tokens \(CUDA.*set runtime.microbatch_tokens to 1$",
    ) as asked:
        find_smaller(Line(1), 0, budget=3, world=second, where="step 7", error=error)
    assert asked.value.microbatch_tokens == 1
    with pytest.raises(
        torch.OutOfMemoryError, match=r"rank 1 of 2: .*1 tokens, whose parts cannot be taken one by one"
    ):
        find_smaller(Line(1), 0, budget=1, world=second, where="step 7", error=error)


def test_what_checkpoints_cost_is_told_once_with_a_cadence_at_which_they_cost_little(
    caplog: pytest.LogCaptureFixture,
) -> None:
    saving = Saving(every=20, begun=Progress(step=40, seconds=100.0))
    for count in range(1, 5):  # each of 20 s behind twenty steps of 5 s in all
        saving.add(20.0, Progress(step=40 + 20 * count, seconds=100.0 + 5.0 * count))
    assert [record.getMessage() for record in caplog.records] == [
        "step 100: a checkpoint takes 20 s and 20 steps 5 s; runtime.checkpoint_every_steps is 20, of 1600 checkpoints would take about 5 % of it"
    ]


@pytest.mark.parametrize(
    ("every", "steps", "seconds"),
    [
        (500, 100, 500.0),  # stopped long before one was due
        (500, 1, 5.0),  # due right behind a resume
        (20, 20, 701.0),
        (0, 1, 1.0),  # only when it is stopped
        (20, 0, 0.0),  # stopped before the first step
    ],
)
def test_a_checkpoint_that_costs_little_at_its_cadence_is_not_told_of(
    every: int, steps: int, seconds: float, caplog: pytest.LogCaptureFixture
) -> None:
    Saving(every=every, begun=Progress()).add(70.0, Progress(step=steps, seconds=seconds))
    assert not caplog.records


def test_metrics_are_on_disk_before_the_checkpoint_that_tells_of_them(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    runtime = Runtime(checkpoint_every_steps=2)
    run_steps(make_line(), Line(3), settings(), job=job, runtime=runtime, identity={})
    assert flushed[0] == str(job.output / "metrics.jsonl")
    assert flushed[-1] == str(job.work / "checkpoints")
