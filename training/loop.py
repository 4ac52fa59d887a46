"""The only training loop: steps, micro-batches and a scalar loss. It knows no objective, no rows and no model family.

Every part of a step contributes its share of the loss of the global batch: parts are added up, never averaged, so the cut
into micro-batches, and which rank runs which, change nothing but speed and memory.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from training.checkpoint import Progress, read_rng, restore_checkpoint, save_checkpoint
from training.config import Precision, Runtime, Schedule
from training.distributed import ALONE, World, require_sharded
from training.job import METRICS_FILE, Interrupted, Job, OutOfMemory
from training.memory import GIB, keep_freed_memory, read_memory
from training.metrics import MetricsWriter

LOG = logging.getLogger(__name__)
MAX_SKIPPED_IN_ROW = 3
# What checkpoints take of a training is told where it is more than this share of it, and so many seconds.
SAVING_SHARE, SAVING_TOLD_AFTER = 0.1, 60.0
Computed = TypeVar("Computed")


@dataclass(frozen=True)
class Part:
    """One micro-batch's share of a step. Shares of loss and figures add up to those of the global batch."""

    loss: Tensor  # scalar
    num_tokens: int  # without padding
    num_padded: int  # with padding
    flops: int = 0  # of forward and backward pass; 0 where nobody counts them
    figures: Callable[[], dict[str, float]] = dict  # waits for the device, so it is called after backward

    def done(self) -> "Part":
        """Return the part without its graph, which may hold the micro-batch."""
        return dataclasses.replace(self, loss=self.loss.detach())

    def nothing(self) -> "Part":
        """Return a part whose every share is zero: what a rank runs to keep in step with the others."""
        return Part(self.loss * 0.0, 0, 0, figures=lambda: dict.fromkeys(self.figures(), 0.0))


class Work(Protocol):
    """What a run trains on."""

    num_steps: int

    def cut(self, step: int, *, budget: int, ranks: int) -> list[list[int]]:
        """Return the micro-batches of a step, as positions in its global batch, each within a budget of tokens, enough for all
        ranks where there are as many parts."""
        ...

    def load(self, step: int, members: Sequence[int]) -> Any:
        """Return one micro-batch, on its way to the device."""
        ...

    def part(self, model: Any, batch: Any) -> Part:
        """Run the forward pass of one micro-batch."""
        ...

    def describe(self, step: int) -> dict[str, float]:
        """Return figures of the global batch that need no model."""
        ...

    def row_ids(self, step: int) -> list[str]:
        """Return the rows of a step."""
        ...


class Sampler(Protocol):
    """What shows the model's answers on the way, and leaves model and random state as they were."""

    def start(self, step: int) -> None:
        """Keep of an earlier attempt what is of steps up to this one."""

    def write(self, step: int) -> None:
        """Write the answers after so many steps; every rank calls it."""


@dataclass(frozen=True)
class Settings:
    """What the optimiser does. All of it is identity."""

    learning_rate: float
    weight_decay: float
    schedule: Schedule
    warmup_fraction: float
    max_grad_norm: float
    precision: Precision
    seed: int


def run_steps(
    model: nn.Module,
    work: Work,
    settings: Settings,
    *,
    job: Job,
    runtime: Runtime,
    identity: dict[str, Any],
    world: World = ALONE,
    heldout: Work | None = None,
    sampler: Sampler | None = None,
    peak_flops: float | None = None,
) -> Progress:
    """Train `model` in place from the newest checkpoint, or from the start, to the last step.

    `heldout` is work of one step whose loss is looked at on the way, `sampler` answers prompts; `peak_flops`, a second and of all ranks, is what
    `train/flop_share` is a share of. Writes `output/metrics.jsonl` and `work/checkpoints`; with several ranks each calls it, and
    the first writes the metrics. Interrupted when any rank was told to stop, after a checkpoint of the last whole step.
    ValueError after three steps in a row with a non-finite loss or gradient, for weights that are not finite at the end, and for a
    checkpoint of another run.
    """
    require_sharded(model, world)
    keep_freed_memory()
    torch.manual_seed(settings.seed)
    optimiser = make_optimiser(model, settings)
    given = find_nonfinite(model)
    folder = job.work / "checkpoints"
    progress = restore_checkpoint(folder, model=model, optimiser=optimiser, identity=identity, world=world)
    trainer = Trainer(model, optimiser, work, settings, runtime, job, progress, world, peak_flops)
    if sampler is not None and runtime.samples_every_steps:
        sampler.start(progress.step)
        if progress.step == 0:
            trainer.sample(sampler)
    saving = Saving(every=runtime.checkpoint_every_steps, begun=dataclasses.replace(progress))
    with ExitStack() as stack:
        path = job.output / METRICS_FILE
        if world.is_first:
            metrics = MetricsWriter(path, total=work.num_steps, keep_bytes=progress.metrics_bytes)
            stack.enter_context(metrics)
        while progress.step < work.num_steps:
            rng = read_rng(world.device)
            figures = trainer.take_step()
            if figures is not None:
                figures |= trainer.look_around(heldout, sampler)
                if world.is_first:
                    metrics.write(progress.step, figures)
                    progress.metrics_bytes = metrics.offset()
                rng = read_rng(world.device)
            progress.microbatch_tokens, progress.microbatch_tokens_asked = trainer.budget, runtime.microbatch_tokens
            every = runtime.checkpoint_every_steps
            due = every > 0 and progress.step % every == 0 and 0 < progress.step < work.num_steps
            stopped = world.any(job.stop.is_set())  # one answer, or some ranks would save while others go on
            if stopped or due:
                started = time.monotonic()
                if world.is_first:
                    metrics.sync()
                save_checkpoint(folder, model=model, optimiser=optimiser, progress=progress, rng=rng, identity=identity, world=world)  # fmt: skip
                if world.is_first:
                    saving.add(time.monotonic() - started, progress)
            if stopped:
                raise Interrupted(job.name)
    require_finite_weights(model, given=given, world=world)
    return progress


@dataclass
class Saving:
    """What checkpoints cost of this attempt's time. A large model on a GPU takes steps in less time than its checkpoint takes to be written."""

    every: int  # steps
    begun: Progress  # of the attempt
    count: int = 0
    seconds: float = 0.0
    told: bool = False

    def add(self, seconds: float, progress: Progress) -> None:
        """Count a checkpoint; say once what they cost at this cadence, and at which they would cost little, where it is much."""
        self.seconds, self.count = self.seconds + seconds, self.count + 1
        trained, steps = progress.seconds - self.begun.seconds, progress.step - self.begun.step
        if self.told or not self.every or not steps or self.seconds < SAVING_TOLD_AFTER:
            return
        of_step, of_checkpoint = trained / steps, self.seconds / self.count
        if of_checkpoint < SAVING_SHARE * self.every * of_step:
            return
        self.told = True
        enough = math.ceil(of_checkpoint / max(SAVING_SHARE / 2 * of_step, 1e-6))
        LOG.warning(
            "step %d: a checkpoint takes %.0f s and %d steps %.0f s; runtime.checkpoint_every_steps is %d, of %d checkpoints would take about %.0f %% of it",
            *(progress.step, of_checkpoint, self.every, self.every * of_step, self.every, enough, 50 * SAVING_SHARE),
        )


def find_nonfinite(model: nn.Module) -> set[str]:
    """Return the parameters that hold NaN or infinite numbers, in this rank's part of them."""
    parts = ((name, p.to_local() if isinstance(p, DTensor) else p) for name, p in model.named_parameters())
    return {name for name, part in parts if not part.isfinite().all()}


def require_finite_weights(model: nn.Module, *, given: set[str], world: World) -> None:
    """Raise ValueError where training has left numbers that are none: no loss has looked at what the last steps did. Some rows of an embedding
    that nobody reads may have been so before."""
    names = sorted(name for name, _ in model.named_parameters())
    if broken := world.union(names, find_nonfinite(model) - given):
        raise ValueError(
            f"after the last step {len(broken)} tensors hold NaN or infinite numbers (first: {', '.join(broken[:3])}), which "
            "they did not before; expected finite ones; lower the learning rate or the weight decay; nothing is exported"
        )


def is_due(every: int, step: int, last: int) -> bool:
    """Say whether something done every so many steps, and at the last one, is due after this step."""
    return every > 0 and (step % every == 0 or step == last)


@dataclass
class Trainer:
    """Model, optimiser and progress of one run, one step at a time."""

    model: nn.Module
    optimiser: torch.optim.Optimizer
    work: Work
    settings: Settings
    runtime: Runtime
    job: Job
    progress: Progress
    world: World = ALONE
    peak_flops: float | None = None  # a second, of all ranks' devices; None where nobody knows it
    budget: int = field(init=False)  # tokens a micro-batch: as asked for, or what the device has room for
    _ahead: "Beginning | None" = None

    def __post_init__(self) -> None:
        asked, progress = self.runtime.microbatch_tokens, self.progress
        # What an earlier attempt found no room for is not tried again, unless something else is asked for now.
        self.budget = progress.microbatch_tokens if progress.microbatch_tokens_asked == asked else asked

    def take_step(self) -> dict[str, float] | None:
        """Take the next step and return its metrics; None, with the model as before, when asked to stop within it."""
        step = self.progress.step
        started = time.monotonic()
        total = self.accumulate(step)
        if total is None:
            self.optimiser.zero_grad()
            return None
        norm = self.update(step, total)
        seconds = time.monotonic() - started
        self.progress.step += 1
        self.progress.tokens += total.num_tokens
        self.progress.flops += total.flops
        self.progress.seconds += seconds
        figures = {
            "loss": total.loss,
            "grad_norm": norm,
            "learning_rate": learning_rate(self.settings, step, num_steps=self.work.num_steps),
            "tokens_per_second": total.num_tokens / seconds,
            "padding_share": 1.0 - total.num_tokens / total.num_padded,
            "skipped": float(self.progress.skipped),
            "microbatch_tokens": float(self.budget),
            **self.describe_speed(total.flops / seconds),
            **self.describe_memory(),
            **total.figures,
            **self.work.describe(step),
        }
        return {f"train/{name}": value for name, value in figures.items()}

    def describe_speed(self, flops_per_second: float) -> dict[str, float]:
        """Return useful operations a second, and their share of the device's rate; nothing where they are not counted."""
        if not flops_per_second:
            return {}
        share = {"flop_share": flops_per_second / self.peak_flops} if self.peak_flops else {}
        return {"tflops_per_second": flops_per_second / 1e12, **share}

    def describe_memory(self) -> dict[str, float]:
        """Return the GiB that the rank with the most of them holds, and held at most (`read_memory` says since when)."""
        now, most = read_memory(self.world.device)
        return {"memory_gib": self.world.max(now / GIB), "peak_memory_gib": self.world.max(most / GIB)}

    def accumulate(self, step: int) -> "Total | None":
        """Add up loss and gradients of all micro-batches of a step; None when asked to stop between two of them."""
        return self.fit(partial(self.add_up, step), self.work, step, where=f"step {step}")

    def fit(self, compute: Callable[[], Computed], work: Work, step: int, *, where: str) -> Computed:
        """Return what is computed of a step of some work; where the device has no room for a micro-batch, it is computed anew with half
        the budget, which stays halved. OutOfMemory of several ranks, torch.OutOfMemoryError where nothing smaller is left."""
        while True:
            try:
                return compute()
            except torch.OutOfMemoryError as error:
                smaller = find_smaller(work, step, budget=self.budget, world=self.world, where=where, error=error)
            self.shrink(smaller)  # outside the handler, which would keep the failed pass's tensors alive

    def shrink(self, budget: int) -> None:
        """Go on with a smaller budget of tokens a micro-batch, and with nothing left of the step that failed."""
        LOG.warning("no room for micro-batches of %d tokens: going on with %d", self.budget, budget)
        self.budget = budget
        self.optimiser.zero_grad()
        torch.cuda.empty_cache()

    def add_up(self, step: int) -> "Total | None":
        """Add up loss and gradients of all micro-batches of a step, as the budget cuts them. Nothing is read back before all are on their
        way to an accelerator, and the norm of the gradients with them."""
        parts: list[Part] = []
        _, _, shares, batch = self.begin(step)
        for place, (_, counts) in enumerate(shares):
            if self.world.any(self.job.stop.is_set()):
                return None
            is_last = place == len(shares) - 1
            if isinstance(self.model, FSDPModule):  # gradients are sharded at once, replicas add theirs up at the end
                self.model.set_requires_all_reduce(is_last)
            with self.world.autocast(self.settings.precision):
                part = self.work.part(self.model, batch)
            if not counts:
                part = part.nothing()
            part.loss.backward()
            if not is_last:
                batch = self.work.load(step, shares[place + 1][0])
            part = part.done()
            parts.append(part)
        norm = self.measure_norm()
        if step + 1 < self.work.num_steps:  # while an accelerator is busy
            with suppress(torch.OutOfMemoryError):  # the next step finds no room by itself then
                self._ahead = self.begin(step + 1)
        return Total.of(parts, self.world, norm=norm)

    def begin(self, step: int) -> "Beginning":
        """Return how a step is cut, with its first micro-batch; at once where the step before has seen to it."""
        ahead, self._ahead = self._ahead, None  # what it holds is the step's to let go
        if ahead is not None and ahead[:2] == (step, self.budget):
            return ahead
        shares = list(self.world.share(self.work.cut(step, budget=self.budget, ranks=self.world.size)))
        return Beginning(step, self.budget, shares, self.work.load(step, shares[0][0]))

    def measure_norm(self) -> Tensor:
        """Return the norm of all ranks' gradients together, on all of them the same to the bit."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if not isinstance(norm, DTensor):
            return norm
        whole = norm.full_tensor()
        if norm.device_mesh.ndim > 1:  # each replica adds up its own parts, which one may do in another order
            dist.all_reduce(whole, dist.ReduceOp.MAX)
        return whole

    def look_around(self, heldout: Work | None, sampler: Sampler | None) -> dict[str, float]:
        """Look at the held-out loss and let the model answer, where that is due after so many steps; return the figures that it gives."""
        figures, runtime, step, last = {}, self.runtime, self.progress.step, self.work.num_steps
        if heldout is not None and is_due(runtime.heldout_every_steps, step, last):
            figures["heldout/loss"] = self.look(heldout)
        if sampler is not None and is_due(runtime.samples_every_steps, step, last):
            self.sample(sampler)
        return figures

    def look(self, work: Work) -> float:
        """Return the loss of other work's first step under the model as it is."""
        return self.fit(partial(self.evaluate, work), work, 0, where=f"held-out rows after {self.progress.step} steps")

    @torch.no_grad()
    def evaluate(self, work: Work) -> float:
        """Return the loss of other work's first step, as the budget cuts it, of the model without dropout."""
        parts: list[Part] = []
        training = self.model.training
        self.model.eval()
        try:
            for members, counts in self.world.share(work.cut(0, budget=self.budget, ranks=self.world.size)):
                with self.world.autocast(self.settings.precision):
                    part = work.part(self.model, work.load(0, members))
                parts.append(part if counts else part.nothing())
        finally:
            self.model.train(training)
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # no backward pass does it here, and the optimiser needs parts
        return Total.of(parts, self.world).loss

    def sample(self, sampler: Sampler) -> None:
        """Let the model as it is answer."""
        with self.world.autocast(self.settings.precision):
            sampler.write(self.progress.step)

    def update(self, step: int, total: "Total") -> float:
        """Clip and apply the gradients, or skip the step when loss or gradient is not finite. Return the gradient norm."""
        assert total.norm is not None
        norm = total.norm.item()  # read here alone: behind the optimiser it would wait for it
        if math.isfinite(total.loss) and math.isfinite(norm):
            if norm > self.settings.max_grad_norm:  # else a pass through all gradients would multiply them by 1
                torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.settings.max_grad_norm, total.norm)
            for group in self.optimiser.param_groups:
                group["lr"] = learning_rate(self.settings, step, num_steps=self.work.num_steps)
            self.apply(step)
            self.progress.loss = total.loss
            self.progress.skipped_in_row = 0
            self.progress.skipped_rows = []
        else:
            self.skip(step)
        self.optimiser.zero_grad()
        return norm

    def apply(self, step: int) -> None:
        """Let the optimiser change the weights. Not taken again where it has no room: some of them may be changed already."""
        try:
            self.optimiser.step()
        except torch.OutOfMemoryError as error:
            trained = sum(p.numel() for group in self.optimiser.param_groups for p in group["params"])
            raise torch.OutOfMemoryError(
                f"step {step}, rank {self.world.rank} of {self.world.size}: the device has no room for AdamW's moments of {trained:,} trained "
                f"parameters ({brief(error)}); expected 8 bytes for each, shared by the ranks; raise runtime.ranks, train an adapter "
                "(train.lora.rank), or take a device with more memory; smaller micro-batches do not help"
            ) from error

    def skip(self, step: int) -> None:
        """Count and tell a step with a non-finite loss or gradient; ValueError when it is the third in a row."""
        progress = self.progress
        progress.skipped += 1
        progress.skipped_in_row += 1
        row_ids = self.work.row_ids(step)
        progress.skipped_rows += row_ids
        if self.world.is_first:
            LOG.warning(
                "step %d: loss or gradient is NaN or infinite; skipped, nothing is changed; its rows: %s",
                step,
                ", ".join(row_ids),
            )
        if progress.skipped_in_row >= MAX_SKIPPED_IN_ROW:
            raise ValueError(
                f"step {step}: loss or gradient was NaN or infinite in {progress.skipped_in_row} steps in a row; expected finite "
                f"ones; rows of these steps: {', '.join(progress.skipped_rows)}; lower the learning rate or look at these rows"
            )


class Beginning(NamedTuple):
    """What a step needs before its first forward pass: this rank's shares of it, as a budget cuts them, and the first of them loaded."""

    step: int
    budget: int
    shares: list[tuple[list[int], bool]]
    batch: Any


@dataclass(frozen=True)
class Total:
    """Sums over the micro-batches of a step and all ranks, and the norm of the gradients where there are some."""

    loss: float
    num_tokens: int
    num_padded: int
    flops: int
    figures: dict[str, float]
    norm: Tensor | None = None

    @classmethod
    def of(cls, parts: Sequence[Part], world: World, *, norm: Tensor | None = None) -> "Total":
        """Add up this rank's shares, and those of all."""
        figures: dict[str, float] = {}
        for part in parts:
            for name, value in part.figures().items():
                figures[name] = figures.get(name, 0.0) + value
        counts = (
            sum(part.num_tokens for part in parts),
            sum(part.num_padded for part in parts),
            sum(part.flops for part in parts),
        )
        loss, tokens, padded, flops, *values = world.sum(
            [sum(part.loss.item() for part in parts), *counts, *figures.values()]
        )
        return cls(loss, int(tokens), int(padded), int(flops), dict(zip(figures, values, strict=True)), norm)


def halve_budget(work: Work, step: int, *, budget: int, ranks: int) -> int | None:
    """Return the largest half, quarter ... of a budget that cuts a step into more micro-batches; None where none does."""
    whole = len(work.cut(step, budget=budget, ranks=ranks))
    while budget > 1:
        budget //= 2
        if len(work.cut(step, budget=budget, ranks=ranks)) > whole:
            return budget
    return None


def find_smaller(work: Work, step: int, *, budget: int, world: World, where: str, error: torch.OutOfMemoryError) -> int:
    """Return the next smaller budget after a micro-batch that had no room on the only rank.

    Of several ranks OutOfMemory, with that budget: none of them can go on alone. torch.OutOfMemoryError where there is none.
    """
    smaller = halve_budget(work, step, budget=budget, ranks=world.size)
    got = f"{where}, rank {world.rank} of {world.size}: the device has no room for a micro-batch of at most {budget} tokens"
    if smaller is None:
        raise torch.OutOfMemoryError(
            f"{got}, whose parts cannot be taken one by one (a single response, or a prompt's that depend on each other); expected "
            "room for it; lower max_tokens, or take a device with more memory"
        ) from error
    if world.size > 1:
        raise OutOfMemory(
            f"{got} ({brief(error)}); expected room for it; set runtime.microbatch_tokens to {smaller}",
            microbatch_tokens=smaller,
        ) from error
    return smaller


def brief(error: Exception) -> str:
    """Return the first sentence of torch's message, without the advice and the addresses that follow."""
    return str(error).partition(". ")[0]


def learning_rate(settings: Settings, step: int, *, num_steps: int) -> float:
    """Return the learning rate of the step with this index (from 0): linear warm-up, then the schedule towards 0."""
    warmup_steps = round(settings.warmup_fraction * num_steps)
    if step < warmup_steps:
        return settings.learning_rate * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    factor = {
        Schedule.constant: 1.0,
        Schedule.linear: 1.0 - done,
        Schedule.cosine: 0.5 * (1.0 + math.cos(math.pi * done)),
    }[settings.schedule]
    return settings.learning_rate * factor


def make_optimiser(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """Return AdamW over all trainable parameters; matrices decay, norms and biases do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.learning_rate, fused=True)
