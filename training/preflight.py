"""What is checked on the real first batches before any hour is spent: that the run trains what it says, and that it fits.

Each check has a name and one line: what was seen, or what, where, got, expected, next. All failures are told together. What
needs no model is looked at first; what does is bounded in time by a share of the run that it precedes. Nothing is changed:
no weight, no random state.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from training.config import Layout, Precision, Runtime
from training.data.batch import collate, count_padded
from training.data.examples import Example
from training.data.rows import find_rows_file
from training.distributed import World
from training.job import Interrupted, Job, write_json
from training.logprobs import MAX_LAYOUT_GAP, Policy, check_head, check_layout, choose_groups, sum_logps
from training.loop import find_smaller, halve_budget
from training.memory import Footprint, MicroBatchSize, estimate_footprint, measure_free, measure_peak, show_bytes
from training.model import DTYPES
from training.objectives.objective import Objective, WeightedLikelihood
from training.render import Rendered
from training.sharding import as_layers, reshard
from training.steps import Forward, Steps

# R responses of the first step, B those that are tried, T tokens of one response, G prompts

FILE = "preflight.json"
MOST_SECONDS = 30.0
LEAST_SECONDS = 5.0
SHARE_OF_RUN = 0.05
ROWS_LOOKED_AT = 256  # by the checks that need no model
ROWS_SHOWN = 3
MOST_TRIED_TOKENS = 2048
SEARCH_SECONDS = 1.0  # for the largest micro-batch of a long plan
EXCERPT_CHARS = 120


@dataclass(frozen=True)
class Ready:
    """All that a training run starts with."""

    job: Job
    runtime: Runtime
    world: World
    precision: Precision
    policy: Policy
    tokenizer: Any
    examples: Sequence[Example]
    objective: Objective
    forward: Forward
    steps: Steps

    @property
    def model(self) -> Any:
        """The language model of the policy."""
        return self.policy.model

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.world.device

    @property
    def layers_dtype(self) -> torch.dtype:
        """What layers compute in without autocast: sharded ones are gathered in the precision of the matrix products."""
        return torch.float32 if self.world.size == 1 else DTYPES[self.precision]


class Failure(Exception):  # noqa: N818 - a finding, told with all others
    """What a check found wrong, in one line, and the rows that show it."""

    def __init__(self, line: str, row_ids: Sequence[str] = ()) -> None:
        super().__init__(line)
        self.row_ids = list(row_ids)[:ROWS_SHOWN]


class NotApplicable(Exception):  # noqa: N818 - likewise
    """Why a check has nothing to say about this run."""


@dataclass(frozen=True)
class Check:
    """One check's outcome."""

    name: str
    outcome: str  # passed | failed | not applicable
    line: str
    seconds: float
    rows: list[dict[str, str]] = field(default_factory=list)  # row_id and excerpt of the rows that show a failure


@dataclass
class Report:
    """All outcomes of a run's preflight."""

    plan: str  # digest of the steps that were looked at
    runtime: dict[str, Any]
    seconds_allowed: float
    microbatch_tokens: int  # what the device has room for
    checks: list[Check] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def failures(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.outcome == "failed"]

    @property
    def passed(self) -> bool:
        """Whether all checks, of which that of memory is the last, were made and none failed."""
        return not self.failures and any(check.name == "memory" for check in self.checks)

    @property
    def seconds(self) -> float:
        """What it took."""
        return round(sum(check.seconds for check in self.checks), 3)

    def as_json(self) -> dict[str, Any]:
        """Return what `preflight.json` holds."""
        return {"passed": self.passed, "seconds": self.seconds} | asdict(self)

    def summary(self) -> dict[str, int | float]:
        """Return the figures of a run's summary."""
        done = {
            f"preflight_{outcome}": sum(c.outcome == outcome for c in self.checks) for outcome in ("passed", "failed")
        }
        peak = {"preflight_peak_bytes": self.memory["peak_bytes"]} if "peak_bytes" in self.memory else {}
        return done | {"preflight_seconds": self.seconds} | peak

    def require(self) -> None:
        """Raise ValueError with every failure, where there is one."""
        if self.failures:
            raise ValueError(
                f"preflight: {len(self.failures)} of {len(self.checks)} checks failed, nothing was trained:\n"
                + "\n".join(describe_failure(check) for check in self.failures)
            )


def describe_failure(check: Check) -> str:
    """Return a failure in words: its line, and the rows that show it."""
    rows = "".join(f"\n      {row['row_id'][:12]}  {row['excerpt']}" for row in check.rows)
    return f"  - {check.name}: {check.line}{rows}"


def check_run(ready: Ready) -> Report:
    """Make every check and write `output/preflight.json`; the model is ready for its layout afterwards.

    An attempt that goes on after an earlier one has passed makes the layout's check alone. Every rank calls it, comes to the
    same findings, and the first one writes them.
    """
    path, world = ready.job.output / FILE, ready.world
    report = Report(
        ready.steps.digest, ready.runtime.model_dump(mode="json"), LEAST_SECONDS, ready.runtime.microbatch_tokens
    )
    earlier = read_report(path) if world.is_first else None
    if earlier and (not earlier.passed or (earlier.plan, earlier.runtime) != (report.plan, report.runtime)):
        earlier = None
    if world.any(earlier is not None):
        check_layout_of(ready)
        reshard(ready.policy)
        report.microbatch_tokens = int(world.first(earlier.microbatch_tokens if earlier else 0))
        return earlier or report
    checks = Checks(ready, report)
    for check in (
        checks.weights,
        checks.trained_tokens,
        checks.stop_tokens,
        checks.bos,
        checks.output_head,
        checks.unit_weights,
        checks.layout,
    ):
        checks.make(check)
    if not any(failed.name in ("output_head", "layout") for failed in report.failures):
        checks.measure_speed()
        for check in (checks.reference, checks.microbatches, checks.memory):
            checks.make(check)
    reshard(ready.policy)
    if world.is_first:
        write_json(path, report.as_json())
    return report


def check_layout_of(ready: Ready) -> int:
    """Make the model ready for the run's layout and return how many rows were looked at; ValueError as `check_layout`."""
    groups = choose_groups(example.samples for example in ready.examples)
    with as_layers(ready.world, precision=ready.precision):
        check_layout(
            ready.policy,
            groups,
            layout=ready.runtime.layout,
            device=ready.device,
            dtype=ready.layers_dtype,
            narrow=DTYPES[ready.precision] != ready.layers_dtype,  # as it will train
        )
    return len(groups)


def read_report(path: Path) -> Report | None:
    """Return what an earlier attempt's `preflight.json` tells, None where there is none."""
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    told = {name: found[name] for name in ("plan", "runtime", "seconds_allowed", "microbatch_tokens", "memory")}
    return Report(**told, checks=[Check(**check) for check in found["checks"]])


class Checks:
    """The checks of one run; each returns its line, or raises Failure or NotApplicable."""

    def __init__(self, ready: Ready, report: Report) -> None:
        self._ready, self._report = ready, report
        self._started = time.monotonic()
        self._seconds_per_token = 0.0  # of a forward pass
        self._tried: list[int] = []  # responses of the first step, whole prompts
        self._logp_B = np.zeros(0)

    def make(self, check: Callable[[], str]) -> None:
        """Make a check and note how it came out, under the name of its function."""
        if self._ready.world.any(self._ready.job.stop.is_set()):
            raise Interrupted(self._ready.job.name)
        started = time.monotonic()
        outcome, rows = "passed", []
        try:
            line = check()
        except NotApplicable as reason:
            outcome, line = "not applicable", str(reason)
        except Failure as failure:
            outcome, line = "failed", str(failure)
            rows = self._excerpts(failure.row_ids)
        except ValueError as refusal:  # of the probes that training has anyway
            outcome, line = "failed", str(refusal)
        name = check.__name__
        self._report.checks.append(Check(name, outcome, line, round(time.monotonic() - started, 3), rows))
        if self._ready.world.is_first:
            sys.stderr.write(f"preflight: {name} {outcome}: {line}\n")

    # --- what needs no model ---

    def weights(self) -> str:
        """Weights are finite and not negative; those of a weighted likelihood add up to the number of responses."""
        steps = self._ready.steps
        sums = isinstance(self._ready.objective, WeightedLikelihood)
        for step in range(steps.num_steps):
            weight_R = steps.weights(step)
            if not (np.isfinite(weight_R).all() and (weight_R >= 0).all()):
                raise Failure(
                    f"step {step}: weights from {weight_R.min():.6g} to {weight_R.max():.6g}; expected finite ones, 0 or more; "
                    "check rewards and lambda",
                    steps.row_ids(step),
                )
            if sums and abs(weight_R.sum() - len(weight_R)) > 1e-6 * len(weight_R):
                raise Failure(
                    f"step {step}: its weights add up to {weight_R.sum():.9g}; expected {len(weight_R)}, the number of its responses; "
                    "the objective does not normalise over the global batch",
                    steps.row_ids(step),
                )
        return f"{steps.num_steps} steps: finite, none negative" + (", each adding up to its responses" if sums else "")

    def trained_tokens(self) -> str:
        """No step is without a token that is trained."""
        steps = self._ready.steps
        for step in range(steps.num_steps):
            columns = steps.columns(step)
            if not columns.num_tokens_R[steps.weights(step) > 0].sum():
                raise Failure(
                    f"step {step}: none of its {len(columns.num_tokens_R)} responses has a trained token and a weight above 0; "
                    "expected at least one; drop these rows or raise batch_prompts",
                    steps.row_ids(step),
                )
        return f"each of {steps.num_steps} steps has some"

    def stop_tokens(self) -> str:
        """The last trained token of a response that was not cut short is one that ends generation elsewhere too."""
        model, tokenizer = self._ready.model, self._ready.tokenizer
        own = model.generation_config.eos_token_id
        stop = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
        examples = self._first_examples()
        cut_short = {row["row_id"]: row["truncated"] for row in self._read_rows([e.row_id for e in examples])}
        looked_at, wrong = 0, {}
        for example in examples:
            flags = cut_short.get(example.row_id) or [False] * example.num_responses
            for place, sample in zip(example.places, example.samples, strict=True):
                if flags[place]:
                    continue
                looked_at += 1
                if int(sample.ids_T[-1]) not in stop:
                    wrong[example.row_id] = int(sample.ids_T[-1])
        if wrong:
            token = next(iter(wrong.values()))
            raise Failure(
                f"{len(wrong)} of {len(examples)} rows end with token {token} ({tokenizer.convert_ids_to_tokens(token)!r}); expected "
                f"one of {sorted(stop)}, at which the model's configuration stops: it would never learn to stop for others; set "
                "eos_token_id in generation_config.json or eos_token in tokenizer_config.json to the token the chat template ends with",
                list(wrong),
            )
        return f"{looked_at} responses that were not cut short end with one of {sorted(stop)}"

    def bos(self) -> str:
        """A conversation begins with as many BOS tokens as its template writes."""
        tokenizer = self._ready.tokenizer
        bos = tokenizer.bos_token_id
        if bos is None:
            raise NotApplicable("the tokenizer has no BOS token")
        text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        expected = 0
        while text.startswith(tokenizer.bos_token):
            text = text.removeprefix(tokenizer.bos_token)
            expected += 1
        examples = self._first_examples()
        got = {e.row_id: count_leading(sample.ids_T, bos) for e in examples for sample in e.samples}
        wrong = [row_id for row_id, count in got.items() if count != expected]
        if wrong:
            raise Failure(
                f"{len(wrong)} of {len(examples)} rows begin with {got[wrong[0]]} BOS tokens ({tokenizer.bos_token!r}); expected "
                f"{expected}, as the chat template writes; take the token's text out of these prompts, or mend the template",
                wrong,
            )
        plain = count_leading(np.asarray(tokenizer("a")["input_ids"]), bos)
        return (
            f"{expected} at the start of each of {len(examples)} rows, as the template writes; plain text gets {plain}"
        )

    # --- what runs the model ---

    def output_head(self) -> str:
        """Hidden states times output embedding are the model's logits."""
        with as_layers(self._ready.world, precision=self._ready.precision):
            check_head(self._ready.policy)
        return "hidden states times output embedding are the logits"

    def layout(self) -> str:
        """What the layout gives is what each response gives alone; the model is ready for it afterwards."""
        count = check_layout_of(self._ready)
        layout = self._ready.runtime.layout.value
        return f"{layout}: the log-probabilities of {count} rows, the longest and the shortest, are those of separate responses"

    def measure_speed(self) -> None:
        """Time one prompt's pass; choose how much of the first step is tried, and how long all may take."""
        ready, steps = self._ready, self._ready.steps
        group_R = steps.columns(0).group_R
        first = [index for index, group in enumerate(group_R) if group == group_R[0]]
        started = time.monotonic()
        self._values(first)
        seconds = self._ready.world.max(time.monotonic() - started)  # of the slowest rank; all go by the same clock
        self._seconds_per_token = seconds / self._count(first)
        of_run = sum(len(s.ids_T) for e in ready.examples for s in e.samples) * steps.num_steps / steps.steps_per_epoch
        seconds = SHARE_OF_RUN * 3 * of_run * self._seconds_per_token
        self._report.seconds_allowed = round(min(MOST_SECONDS, max(LEAST_SECONDS, seconds)), 3)
        # four forward passes in a third of the time
        tokens = min(MOST_TRIED_TOKENS, self._seconds_left() / 3 / 4 / self._seconds_per_token)
        groups = dict.fromkeys(group_R.tolist())
        self._tried = first
        for group in list(groups)[1:]:
            more = [*self._tried, *np.flatnonzero(group_R == group).tolist()]
            if self._count(more) > tokens:
                break
            self._tried = more
        self._logp_B = self._values(self._tried)

    def reference(self) -> str:
        """The policy, where it is the reference, gives the stored log-probabilities before its first step."""
        columns = self._ready.steps.columns(0)
        if columns.logp_ref_R is None:
            raise NotApplicable("the objective reads no reference log-probabilities")
        scored = read_summary(self._ready.job.inputs.get("reference"))  # of the policy's own weights, or it was refused
        tokens_B = columns.num_tokens_R[self._tried]
        miss_B = np.abs(self._logp_B - columns.logp_ref_R[self._tried])
        gap_B, mean = miss_B / tokens_B, miss_B.sum() / tokens_B.sum()
        bound = max(MAX_LAYOUT_GAP[DTYPES[p]] for p in (self._ready.precision, Precision(scored["precision"])))
        # A short response alone strays further than all together. Not "any above": a stored NaN is a failure too.
        if not (mean <= bound and (gap_B <= 10 * bound).all()):
            worst = np.argsort(-np.nan_to_num(gap_B, nan=np.inf))[:ROWS_SHOWN]
            raise Failure(
                f"the policy has the reference's weights, yet the stored log-probabilities of {len(gap_B)} responses differ by "
                f"{mean:.3g} nats a token from its own, those of one by {gap_B[worst[0]]:.3g}; expected at most {bound:g} and {10 * bound:g}; "
                "the chat template or the rows changed since, or the column is of another model: score the reference again",
                self._row_ids([self._tried[place] for place in worst]),
            )
        return f"{len(gap_B)} responses: the policy's log-probabilities are the stored ones within {mean:.2g} nats a token (at most {bound:g})"

    def unit_weights(self) -> str:
        """With weights of 1 the loss is the sum of the stock model's cross-entropies. Before trees replace its attention."""
        ready = self._ready
        if not isinstance(ready.objective, WeightedLikelihood):
            raise NotApplicable("the objective is no weighted likelihood")
        if self._has_failed("output_head"):
            raise NotApplicable("the output head is not the model's")
        samples = ready.steps.samples(0)
        members = sorted(range(len(samples)), key=lambda index: len(samples[index].ids_T))[:2]
        samples = [samples[index] for index in members]
        # On one rank in float32 whatever the precision: this is about what is computed, not how closely.
        with torch.no_grad(), as_layers(ready.world, precision=ready.precision):
            logp_B = torch.cat([sum_logps(ready.policy, collate([sample], device=ready.device)) for sample in samples])
            expected = sum(ready.policy(stock_nll, sample, ready.device) for sample in samples)
        columns_B = ready.steps.columns(0).take(members)
        got = ready.objective.loss_sum(logp_B, torch.ones_like(logp_B), columns_B).item()
        tokens = sum(sample.num_trained for sample in samples)
        bound = MAX_LAYOUT_GAP[ready.layers_dtype]
        if not abs(got - expected) / tokens <= bound:
            raise Failure(
                f"the loss of {len(members)} responses with weights of 1 is {got:.6g}, the stock model's cross-entropy {expected:.6g} "
                f"nats; expected them to differ by at most {bound} a token; objective or architecture does not do what it says",
                self._row_ids(members),
            )
        return f"{tokens} tokens: {got / tokens:.6g} nats a token, {expected / tokens:.6g} by the stock model's cross-entropy"

    def microbatches(self) -> str:
        """The cut into micro-batches does not move the loss."""
        samples = self._samples(self._tried)
        group_B = self._ready.steps.columns(0).group_R[self._tried]
        whole_groups = self._ready.objective.whole_groups
        cut = self._ready.forward.cut(
            samples, group_B, budget=max(1, self._count(self._tried) // 2), whole_groups=whole_groups
        )
        if len(cut) < 2:
            raise NotApplicable("the first prompt is one micro-batch, however small the budget")
        whole = self._loss(self._tried)
        parts = sum(self._loss([self._tried[b] for b in members]) for members in cut)
        bound = MAX_LAYOUT_GAP[DTYPES[self._ready.precision]]
        if not abs(whole - parts) <= bound * max(abs(whole), abs(parts)):
            raise Failure(
                f"{len(self._tried)} responses of the first step have a loss of {whole:.6g} in one pass and {parts:.6g} in {len(cut)}; "
                f"expected equal ones within {bound:g} of it; what is trained would depend on runtime.microbatch_tokens",
                self._row_ids(self._tried),
            )
        return f"{len(self._tried)} responses: {whole:.6g} in one pass, {parts:.6g} in {len(cut)}"

    def memory(self) -> str:
        """The largest micro-batch goes forward and backward, and with the optimiser's state it fits."""
        asked = self._report.microbatch_tokens
        while (line := self._try_largest()) is None:
            pass  # with the smaller budget that is noted now
        found = self._report.microbatch_tokens
        return line if found == asked else f"{line}; for micro-batches of {asked} tokens there was no room"

    def _try_largest(self) -> str | None:
        """Return what was seen of the largest micro-batch; None, with half the budget noted, where there was no room for it."""
        ready, report = self._ready, self._report
        trial = find_largest_of_first(ready, budget=report.microbatch_tokens)
        needed = estimate_trial(ready, trial)
        free = share_of_free(ready)
        estimate = needed.gradients + needed.gathered + needed.activations + needed.logits
        report.memory = {
            "microbatch_tokens": trial.tokens, "free_bytes": free, "estimated_bytes": estimate, "optimiser_bytes": needed.optimiser,
        }  # fmt: skip
        row_ids = ready.steps.row_ids(trial.step)
        seconds = 4 * trial.tokens * self._seconds_per_token
        left = self._seconds_left()
        if ready.device.type == "cpu" or seconds > left:  # where too much is a kill and no exception, or is not tried
            self._require_room(estimate + needed.optimiser, free, f"{trial} would take about", row_ids)
        if seconds > left:
            return (
                f"{trial}: not tried, as it would take about {seconds:.0f} s of {left:.0f} s left; by the formula it takes "
                f"{show_bytes(estimate + needed.optimiser)} with the optimiser's state, {show_bytes(free)} are free"
            )
        if ready.world.is_first:
            write_json(ready.job.output / FILE, report.as_json())  # should the kernel end this process now
        peak = self._probe(trial.step, trial.members)
        if peak is None:
            self._halve(trial, free)
            return None
        report.memory["peak_bytes"] = peak
        self._require_room(peak + needed.optimiser, free, f"{trial} took", row_ids)
        return (
            f"{trial} took {show_bytes(peak)} forward and backward, the optimiser's state will take {show_bytes(needed.optimiser)}; "
            f"{show_bytes(free)} were free"
        )

    def _halve(self, trial: "Trial", free: int) -> None:
        """Note a smaller budget of tokens a micro-batch."""
        steps, report = self._ready.steps, self._report
        smaller = halve_budget(steps, trial.step, budget=report.microbatch_tokens)
        if smaller is None:
            raise Failure(
                f"{trial}: the device has no room for its forward and backward pass ({show_bytes(free)} were free), and it cannot be cut; "
                "expected room; lower max_tokens, or take a device with more memory",
                steps.row_ids(trial.step),
            )
        report.microbatch_tokens = smaller

    def _require_room(self, needed: int, free: int, what: str, row_ids: Sequence[str]) -> None:
        if needed > free:
            raise Failure(
                f"{what} {show_bytes(needed)} with the optimiser's state, got {show_bytes(free)} free; expected room for it; set "
                "runtime.activation_checkpointing, lower runtime.microbatch_tokens or max_tokens, or end what else uses the memory",
                row_ids,
            )

    def _probe(self, step: int, members: Sequence[int]) -> int | None:
        """Return the bytes that a micro-batch's forward and backward pass took at most; None where there was no room.

        Several ranks run it at once and the largest of them counts; one without room ends all: OutOfMemory as `find_smaller`.
        """
        try:
            with measure_peak(self._ready.device) as peak:
                with self._autocast():
                    part = self._ready.steps.part(self._ready.policy, self._ready.steps.load(step, members))
                part.loss.backward()
                del part
        except torch.OutOfMemoryError as error:
            if self._ready.world.size > 1:
                budget, world = self._report.microbatch_tokens, self._ready.world
                find_smaller(self._ready.steps, step, budget=budget, world=world, where=f"step {step}", error=error)
            return None
        finally:
            self._ready.policy.zero_grad()
            torch.cuda.empty_cache()
        return int(self._ready.world.max(peak.bytes))

    def _has_failed(self, name: str) -> bool:
        return any(check.name == name for check in self._report.failures)

    def _samples(self, members: Sequence[int]) -> list[Any]:
        samples = self._ready.steps.samples(0)
        return [samples[index] for index in members]

    def _count(self, members: Sequence[int]) -> int:
        group_B = self._ready.steps.columns(0).group_R[list(members)]
        return count_padded(self._samples(members), group_B, layout=self._ready.runtime.layout)

    def _values(self, members: Sequence[int]) -> np.ndarray:
        """Return logp_B of responses of the first step, in one pass."""
        group_B = self._ready.steps.columns(0).group_R[list(members)]
        with torch.no_grad(), self._autocast():
            micro = self._ready.forward.load(self._samples(members), group_B)
            out: Tensor = self._ready.forward.values(self._ready.policy, micro).value_B
        return out.double().cpu().numpy()

    def _loss(self, members: Sequence[int]) -> float:
        with torch.no_grad(), self._autocast():
            return self._ready.steps.part(self._ready.policy, self._ready.steps.load(0, members)).loss.item()

    def _autocast(self) -> torch.autocast:
        wide = self._ready.precision == Precision.float32
        return torch.autocast(self._ready.device.type, dtype=torch.bfloat16, enabled=not wide)

    def _seconds_left(self) -> float:
        passed = self._ready.world.max(time.monotonic() - self._started)
        return max(0.0, self._report.seconds_allowed - passed)

    def _row_ids(self, members: Sequence[int]) -> list[str]:
        columns = self._ready.steps.columns(0)
        return list(dict.fromkeys(columns.row_ids[columns.group_R[index]] for index in members))

    def _first_examples(self) -> list[Example]:
        """Return the first rows of the plan."""
        found: list[Example] = []
        for step in range(self._ready.steps.steps_per_epoch):
            found += self._ready.steps.rows(step)
            if len(found) >= ROWS_LOOKED_AT:
                break
        return found[:ROWS_LOOKED_AT]

    def _read_rows(self, row_ids: Sequence[str]) -> list[dict[str, Any]]:
        path = find_rows_file(self._ready.job.inputs["rows"])
        columns = ["row_id", "prompt", "truncated"]
        rows: list[dict[str, Any]] = pq.read_table(
            path, columns=columns, filters=[("row_id", "in", list(row_ids))]
        ).to_pylist()
        return rows

    def _excerpts(self, row_ids: Sequence[str]) -> list[dict[str, str]]:
        """Return the rows that show a failure, with the end of their prompts."""
        if not row_ids:
            return []
        texts = {row["row_id"]: row["prompt"][-1]["content"] for row in self._read_rows(row_ids)}
        return [{"row_id": row_id, "excerpt": shorten(texts.get(row_id, ""))} for row_id in row_ids]


@dataclass(frozen=True)
class Trial:
    """The micro-batch of a plan that asks most of the device."""

    step: int
    members: list[int]
    tokens: int  # padding included
    looked_at: int  # steps

    def __str__(self) -> str:
        return f"step {self.step}, the largest micro-batch of {self.looked_at} steps: {self.tokens} tokens of {len(self.members)} responses"


def find_largest_of_first(ready: Ready, *, budget: int) -> Trial:
    """Return what the first rank finds in its time, on every rank."""
    trial = None
    if ready.world.is_first:
        trial = find_largest(ready.steps, budget=budget, layout=ready.runtime.layout)
    looked_at = int(ready.world.first(trial.looked_at if trial else 0))
    return trial or find_largest(ready.steps, budget=budget, layout=ready.runtime.layout, num_steps=looked_at)


def find_largest(steps: Steps, *, budget: int, layout: Layout, num_steps: int | None = None) -> Trial:
    """Return the largest micro-batch of some steps: of an epoch, or of as many as can be looked at in a second."""
    best = Trial(step=0, members=[], tokens=-1, looked_at=0)
    ends = time.monotonic() + SEARCH_SECONDS
    for step in range(num_steps or steps.steps_per_epoch):
        samples, group_R = steps.samples(step), steps.columns(step).group_R
        for members in steps.cut(step, budget=budget):
            tokens = count_padded([samples[index] for index in members], group_R[members], layout=layout)
            if tokens > best.tokens:
                best = Trial(step, members, tokens, looked_at=0)
        if num_steps is None and time.monotonic() > ends:
            break
    return dataclasses.replace(best, looked_at=step + 1)


def share_of_free(ready: Ready) -> int:
    """Return the bytes that each rank may take: of a CPU's free memory its share, since those of a machine have one."""
    free = measure_free(ready.device)
    if ready.device.type == "cpu":
        free //= min(ready.runtime.ranks, ready.world.size)
    return -int(ready.world.max(-free))


def estimate_trial(ready: Ready, trial: Trial) -> Footprint:
    """Return what a micro-batch takes by the formula."""
    samples = [ready.steps.samples(trial.step)[index] for index in trial.members]
    seen = sum(len(sample.ids_T) for sample in samples)  # by the responses of trees: their prompts and themselves
    return estimate_footprint(
        ready.model,
        precision=ready.precision,
        ranks=ready.world.size,
        replicas=ready.runtime.replicas,
        micro=MicroBatchSize(
            tokens=trial.tokens,
            keys=seen if ready.runtime.layout == Layout.tree else 0,
            positions=sum(sample.num_trained for sample in samples),
        ),
        kind=ready.device.type,
        activation_checkpointing=ready.runtime.activation_checkpointing,
    )


def stock_nll(model: Any, sample: Rendered, device: torch.device) -> float:
    """Return the negative log-likelihood of a response by the model's own logits and torch's cross-entropy, in nats."""
    ids_BT = torch.from_numpy(sample.ids_T.astype(np.int64))[None].to(device)
    logits_TV = model(input_ids=ids_BT, use_cache=False).logits[0, sample.start - 1 : -1].float()
    return torch.nn.functional.cross_entropy(logits_TV, ids_BT[0, sample.start :], reduction="sum").item()


def count_leading(ids_T: np.ndarray, token: int) -> int:
    """Return how many times a token stands at the beginning."""
    return int((np.cumprod(ids_T == token)).sum())


def read_summary(folder: Path | None) -> dict[str, Any]:
    """Return the summary of an input's step; nothing where it has none."""
    path = None if folder is None else folder / "summary.json"
    return json.loads(path.read_text()) if path is not None and path.is_file() else {}


def shorten(text: str) -> str:
    """Return the end of a text in one line."""
    line = " ".join(text.split())
    return line if len(line) <= EXCERPT_CHARS else "…" + line[-EXCERPT_CHARS:]
