"""The check that the largest micro-batch fits in the device's memory."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from training.job import write_json
from training.loop import find_smaller, halve_budget
from training.memory import (
    FLOAT32,
    Footprint,
    MicroBatchSize,
    estimate_footprint,
    estimate_kept,
    measure_free,
    measure_peak,
    show_bytes,
)
from training.preflight.findings import FILE, Failure, Report
from training.preflight.passes import Passes
from training.preflight.ready import Ready

SEARCH_SECONDS = 1.0  # for the largest micro-batch of a long plan


@dataclass(frozen=True)
class Trial:
    """The micro-batch of a plan that asks most of the device."""

    step: int
    members: list[int]
    size: MicroBatchSize
    needed: Footprint  # by the formula
    looked_at: int  # steps

    @property
    def tokens(self) -> int:
        """What goes through the model, padding included."""
        return self.size.tokens

    def __str__(self) -> str:
        return f"step {self.step}, the largest micro-batch of {self.looked_at} steps: {self.tokens} tokens of {len(self.members)} responses"


def memory(ready: Ready, report: Report, passes: Passes) -> str:
    """The largest micro-batch goes forward and backward, and with the optimiser's state it fits; what several ranks have trained can be written."""
    if ready.world.size > 1:
        require_export_room(ready)
    asked = report.microbatch_tokens
    while (line := try_largest(ready, report, passes)) is None:
        pass  # with the smaller budget that is noted now
    found = report.microbatch_tokens
    return line if found == asked else f"{line}; for micro-batches of {asked} tokens there was no room"


def require_export_room(ready: Ready) -> None:
    """Raise Failure where the first machine could not hold the model, whose parts are put together there to be written."""
    needed = FLOAT32 * sum(parameter.numel() for parameter in ready.model.parameters())
    free = round(ready.world.first(measure_free(torch.device("cpu"))))
    if needed > free:
        raise Failure(
            f"the model of {show_bytes(needed)} is put together in the first machine's memory to be written, of which {show_bytes(free)} are free; "
            "expected room for it; take a machine with more memory, or end what else uses it",
            [],
        )


def try_largest(ready: Ready, report: Report, passes: Passes) -> str | None:
    """Return what was seen of the largest micro-batch; None, with half the budget noted, where there was no room for it."""
    trial = find_largest_of_first(ready, budget=report.microbatch_tokens)
    needed = trial.needed
    free = share_of_free(ready)
    report.memory = {
        "microbatch_tokens": trial.tokens, "free_bytes": free, "estimated_bytes": needed.step, "optimiser_bytes": needed.optimiser,
    }  # fmt: skip
    row_ids = ready.steps.row_ids(trial.step)
    seconds = 4 * trial.tokens * passes.seconds_per_token
    left = passes.seconds_left()
    if ready.device.type == "cpu" or seconds > left:  # where too much is a kill and no exception, or is not tried
        require_room(needed.step + needed.optimiser, free, f"{trial} would take about", row_ids)
    if seconds > left:
        return (
            f"{trial}: not tried, as it would take about {seconds:.0f} s of {left:.0f} s left; by the formula it takes "
            f"{show_bytes(needed.step + needed.optimiser)} with the optimiser's state, {show_bytes(free)} are free"
        )
    if ready.world.is_first:
        write_json(ready.job.output / FILE, report.as_json())  # should the kernel end this process now
    peak = probe(ready, report, passes, trial)
    if peak is None:
        halve(ready, report, trial, free)
        return None
    report.memory["peak_bytes"] = peak
    require_room(peak + needed.optimiser, free, f"{trial} took", row_ids)
    return (
        f"{trial} took {show_bytes(peak)} forward and backward, the optimiser's state will take {show_bytes(needed.optimiser)}; "
        f"{show_bytes(free)} were free"
    )


def halve(ready: Ready, report: Report, trial: Trial, free: int) -> None:
    """Note a smaller budget of tokens a micro-batch."""
    steps = ready.steps
    smaller = halve_budget(steps, trial.step, budget=report.microbatch_tokens, ranks=ready.world.size)
    if smaller is None:
        raise Failure(
            f"{trial}: the device has no room for its forward and backward pass ({show_bytes(free)} were free), and it cannot be cut; "
            "expected room; lower max_tokens, or take a device with more memory",
            steps.row_ids(trial.step),
        )
    report.microbatch_tokens = smaller


def require_room(needed: int, free: int, what: str, row_ids: Sequence[str]) -> None:
    """Raise Failure where more bytes are needed than are free."""
    if needed > free:
        raise Failure(
            f"{what} {show_bytes(needed)} with the optimiser's state, got {show_bytes(free)} free; expected room for it; set "
            "runtime.activation_checkpointing, lower runtime.microbatch_tokens or max_tokens, or end what else uses the memory",
            row_ids,
        )


def probe(ready: Ready, report: Report, passes: Passes, trial: Trial) -> int | None:
    """Return the bytes that a micro-batch's forward and backward pass took at most; None where there was no room.

    Several ranks run it at once and the largest of them counts; one without room ends all: OutOfMemory as `find_smaller`.
    """
    try:
        devices = [ready.device] if ready.device.type == "cuda" else []
        with torch.random.fork_rng(devices), measure_peak(ready.device) as peak:
            ready.policy.train(ready.is_reward_model)  # with its dropout, whose masks take room too
            with ready.world.autocast(ready.precision):
                part = ready.steps.part(ready.policy, ready.steps.load(trial.step, trial.members))
            part.loss.backward()
            del part
    except torch.OutOfMemoryError as error:
        if ready.world.size > 1:
            budget, world = report.microbatch_tokens, ready.world
            find_smaller(ready.steps, trial.step, budget=budget, world=world, where=f"step {trial.step}", error=error)
        return None
    finally:
        ready.policy.eval()
        ready.policy.zero_grad()
        torch.cuda.empty_cache()
    return int(ready.world.max(peak.bytes))


def find_largest_of_first(ready: Ready, *, budget: int) -> Trial:
    """Return what the first rank finds in its time, on every rank."""
    find = partial(find_largest, ready, budget=budget)
    trial = find() if ready.world.is_first else None
    looked_at = int(ready.world.first(trial.looked_at if trial else 0))
    return trial or find(num_steps=looked_at)


def find_largest(ready: Ready, *, budget: int, num_steps: int | None = None) -> Trial:
    """Return the micro-batch that takes most by the formula, of some steps: of an epoch, or of as many as can be looked at in a second."""
    steps, most = ready.steps, -1
    ends = time.monotonic() + SEARCH_SECONDS
    for step in range(num_steps or steps.steps_per_epoch):
        samples, group_R = steps.samples(step), steps.columns(step).group_R
        for members in steps.cut(step, budget=budget, ranks=ready.world.size):
            size = ready.forward.size([samples[index] for index in members], group_R[members])
            needed = sum(
                estimate_kept(
                    ready.model.config,
                    precision=ready.precision,
                    micro=size,
                    kind=ready.device.type,
                    activation_checkpointing=ready.runtime.activation_checkpointing,
                )
            )
            if needed > most:
                most, found = needed, (step, members, size)
        if num_steps is None and time.monotonic() > ends:
            break
    return Trial(*found, estimate_size(ready, found[-1]), looked_at=step + 1)


def share_of_free(ready: Ready) -> int:
    """Return the bytes that each rank may take: of a CPU's free memory its share, since those of a machine have one."""
    free = measure_free(ready.device)
    if ready.device.type == "cpu":
        free //= min(ready.runtime.ranks, ready.world.size)
    return -int(ready.world.max(-free))


def estimate_size(ready: Ready, size: MicroBatchSize) -> Footprint:
    """Return what a micro-batch takes by the formula."""
    # a reward model with dropout is trained by one rank alone
    replicas = ready.runtime.replicas if ready.world.size > 1 else 1
    return estimate_footprint(
        ready.model,
        precision=ready.precision,
        ranks=ready.world.size,
        replicas=replicas,
        micro=size,
        kind=ready.device.type,
        activation_checkpointing=ready.runtime.activation_checkpointing,
    )
