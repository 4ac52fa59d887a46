"""The verdict on a challenger."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from evaluation.config import GateConfig, GatePolicy, Look
from evaluation.gate.verdict import count_looks
from infra import looks
from infra.fingerprint import digest_file
from infra.store import Store
from tasks.contamination import read_training_texts, write_contamination
from tasks.noise import read_noise
from tasks.step import Attempt, Metrics, Planned, step
from tasks.weights import count_parameters, same_weights
from training.job import write_json

if TYPE_CHECKING:
    from evaluation.gate.decide import Evidence

CHALLENGER, CHAMPION, NOISE = "challenger", "champion", "noise"
WEIGHED = (
    "scores.json", "samples.jsonl", "profile.json", "scores.parquet", "responses.parquet", "rows.parquet", "noise.json",
)  # fmt: skip


@step(version=4)
def gate(config: GateConfig, attempt: Attempt) -> Metrics:
    """Weigh the challenger against the champion. Inputs: `challenger`, `champion` (models), for both of them
    `<who>_rewards`, `<who>_answers` and `<who>_eval_<benchmark>`, `rows`, whose train split the challenger was trained on, and
    the champion's noise floor as `noise` where it was measured."""
    # SciPy takes a second, which a run that finds its verdict need not spend
    from evaluation.answers import read_prompt_ids
    from evaluation.gate.decide import decide, write_verdict
    from evaluation.harness.contamination import flag_contamination, measure_contamination

    inputs = attempt.inputs
    challenger, champion = read_evidence(inputs, CHALLENGER), read_evidence(inputs, CHAMPION)
    contamination = measure_contamination(challenger.results, champion.results, read_training_texts(inputs["rows"]))
    write_contamination(contamination, attempt.output)
    verdict = decide(
        config.policy,
        challenger=challenger,
        champion=champion,
        same_model=same_weights(inputs[CHALLENGER], inputs[CHAMPION]),
        prompts=read_prompt_ids(inputs[f"{CHALLENGER}_answers"]),
        noise=read_noise(inputs[NOISE]) if NOISE in inputs else None,
        contamination=contamination,
        looks=config.looks,
        inputs=digest_inputs(attempt),
    )
    write_verdict(verdict, attempt.output / "verdict.json")
    summary: dict[str, Any] = {"verdict": verdict.decision, "reasons": list(verdict.reasons), "seal": verdict.seal}
    summary["flags"] = {found.benchmark: flag for found in contamination for flag in flag_contamination(found)}
    write_json(attempt.output / "summary.json", summary)
    gains = {f"gate/{target.name}_gain": target.gain for target in verdict.targets}
    hits = {f"gate/{found.benchmark}_in_training_data": found.share for found in contamination}
    return {"gate/promote": float(verdict.decision == "PROMOTE")} | gains | hits


def plan_look(planned: Planned, *, store: Store, model: str) -> Planned:
    """Return the gate step as the look of the year that it is, or would be the next. Reads the store alone."""
    evidence = planned.fingerprint
    return _at_look(
        planned, _read_looks(planned, store, model, year=looks.year_of(store, model=model, evidence=evidence))
    )


def take_look(planned: Planned, *, store: Store, model: str) -> Planned:
    """Put the gate step's look on record before it is taken, and return the step as that look.

    One for which nothing is left of the year is not put there: it holds whatever is weighed.
    """
    policy, evidence = _policy(planned), planned.fingerprint
    year = looks.year_of(store, model=model, evidence=evidence)
    while True:
        before = _read_looks(planned, store, model, year=year)
        if count_looks(policy, before).exhausted or looks.take(
            store, model=model, evidence=evidence, before=len(before), year=year,
            alpha=policy.alpha_of_a_look, planned=policy.planned_looks is not None,
        ):  # fmt: skip
            return _at_look(planned, before)


def _policy(planned: Planned) -> GatePolicy:
    config = planned.config
    assert isinstance(config, GateConfig) and not config.looks, "evidence is named by the step at no look"
    return config.policy


def _read_looks(planned: Planned, store: Store, model: str, *, year: int) -> list[Look]:
    """Return the looks before this one; those that do not say their error are taken to have been planned as this one is."""
    default = {"alpha": _policy(planned).alpha_of_a_look, "planned": True}
    found = looks.read_before(store, model=model, evidence=planned.fingerprint, year=year)
    return [Look.model_validate({name: look.get(name, default[name]) for name in default}) for look in found]


def _at_look(planned: Planned, before: list[Look]) -> Planned:
    return replace(planned, config=planned.config.model_copy(update={"looks": tuple(before)}))


def read_evidence(inputs: Mapping[str, Path], who: str) -> "Evidence":
    """Return what was measured of one model."""
    from evaluation.answers import read_cut_share, read_lengths
    from evaluation.gate.decide import Evidence
    from evaluation.harness.result import read_result

    return Evidence(
        results=[read_result(inputs[name]) for name in sorted(inputs) if name.startswith(f"{who}_eval_")],
        rewards=read_rewards(inputs[f"{who}_rewards"]),
        lengths=read_lengths(inputs[f"{who}_answers"]),
        parameters=count_parameters(inputs[who]),
        cut_share=read_cut_share(inputs[f"{who}_answers"]),
    )


def digest_inputs(attempt: Attempt) -> dict[str, str]:
    """Return what the verdict rests on: the sha256 of every file that was weighed as `<input>/<file>`, which is what its record's
    manifest and `sha256sum` say, and the fingerprint of both models."""
    weighed = {name: folder for name, folder in attempt.inputs.items() if name not in (CHALLENGER, CHAMPION)}
    files = {
        f"{name}/{file}": digest_file(folder / file)
        for name, folder in sorted(weighed.items())
        for file in WEIGHED
        if (folder / file).is_file()
    }
    return {who: attempt.fingerprints[who] for who in (CHALLENGER, CHAMPION)} | files


def read_rewards(folder: Path) -> dict[str, float]:
    """Return the mean reward of each row's responses, by row id."""
    table = pq.read_table(folder / "scores.parquet", columns=["row_id", "reward"]).to_pydict()
    return {row: sum(values) / len(values) for row, values in zip(table["row_id"], table["reward"], strict=True)}
