"""All checks of a run, in order."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from training.data.batch import digest_plan
from training.job import Interrupted, write_json
from training.preflight.findings import FILE, Check, Failure, NotApplicable, Report, read_report
from training.preflight.passes import (
    LEAST_SECONDS,
    Passes,
    check_layout_of,
    compiled_layers,
    layout,
    microbatches,
    output_head,
    padding,
    reference,
    unit_weights,
)
from training.preflight.ready import Ready
from training.preflight.room import memory
from training.preflight.rows import bos, excerpt_rows, stop_tokens, trained_tokens, weights
from training.sharding import reshard


def check_run(ready: Ready) -> Report:
    """Make every check and write `output/preflight.json`; a policy is ready for its layout afterwards.

    An attempt that goes on after an earlier one has passed makes the check of a policy's layout alone. Every rank calls it, comes to the
    same findings, and the first one writes them.
    """
    path, world = ready.job.output / FILE, ready.world
    report = Report(
        ready.steps.digest,
        digest_plan([json.dumps(ready.identity, sort_keys=True)]),
        ready.runtime.model_dump(mode="json"),
        LEAST_SECONDS,
        ready.runtime.microbatch_tokens,
    )
    earlier = read_report(path) if world.is_first else None
    if earlier and not (earlier.passed and earlier.is_of(report)):
        earlier = None
    if world.any(earlier is not None):
        if not ready.is_reward_model:
            check_layout_of(ready)
        reshard(ready.policy)
        report.microbatch_tokens = int(world.first(earlier.microbatch_tokens if earlier else 0))
        return earlier or report
    (check_reward_model if ready.is_reward_model else check_policy)(ready, report)
    reshard(ready.policy)
    if world.is_first:
        write_json(path, report.as_json())
    return report


def check_policy(ready: Ready, report: Report) -> None:
    """Make the checks of a policy that is to be trained."""
    passes = Passes(ready, time.monotonic())
    for check in (weights, trained_tokens, stop_tokens, bos, output_head):
        make(check, ready, report)
    make(unit_weights, ready, report, report)
    make(layout, ready, report)
    if not any(failed.name in ("output_head", "layout") for failed in report.failures):
        passes.measure_speed()
        report.seconds_allowed = passes.seconds_allowed
        make(reference, ready, report, passes)
        make(microbatches, ready, report, passes)
        make(memory, ready, report, report, passes)
        if ready.runtime.compile:
            make(compiled_layers, ready, report, report, passes)


def check_reward_model(ready: Ready, report: Report) -> None:
    """Make the checks of a reward model that is to be trained."""
    ready.policy.eval()
    passes = Passes(ready, time.monotonic())
    make(weights, ready, report)
    make(padding, ready, report)
    passes.measure_speed()
    report.seconds_allowed = passes.seconds_allowed
    make(microbatches, ready, report, passes)
    make(memory, ready, report, report, passes)


def make(check: Callable[..., str], ready: Ready, report: Report, *more: Any) -> None:
    """Make a check and note how it came out, under the name of its function."""
    if ready.world.any(ready.job.stop.is_set()):
        raise Interrupted(ready.job.name)
    started = time.monotonic()
    outcome, rows = "passed", []
    try:
        line = check(ready, *more)
    except NotApplicable as reason:
        outcome, line = "not applicable", str(reason)
    except Failure as failure:
        outcome, line = "failed", str(failure)
        rows = excerpt_rows(ready, failure.row_ids)
    name = check.__name__
    report.checks.append(Check(name, outcome, line, round(time.monotonic() - started, 3), rows))
    if ready.world.is_first:
        sys.stderr.write(f"preflight: {name} {outcome}: {line}\n")
