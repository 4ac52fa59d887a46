"""The gate: from paired results to PROMOTE, HOLD or REJECT with reasons. Pure; docs/gate.md gives tests and formulas.

All guards must pass, so none is corrected for being one of several. One target is named beforehand, so neither is it; of
several any one is enough, so they are (Holm).
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evaluation import statistics
from evaluation.config import HELDOUT_REWARD, GatePolicy, Look
from evaluation.gate import weigh
from evaluation.gate.explain import explain_noise
from evaluation.gate.verdict import (
    AuditRow,
    BoundState,
    Decision,
    FloorVerdict,
    GrowthVerdict,
    GuardState,
    GuardVerdict,
    Looks,
    Noise,
    TargetVerdict,
    Verdict,
    count_looks,
    seal,
)
from evaluation.gate.weigh import ITEMS, PROMPTS, TANGO, Pairs, pair_scores
from evaluation.harness.contamination import Contamination, flag_contamination
from evaluation.harness.result import MODEL_FIELD, BenchmarkResult, pair_items
from evaluation.harness.result import read_result as read_result  # callers read what they decide on
from training.job import write_json

FEW_ITEMS = 50  # by enumeration, the score test's error rate at alpha 0.05 is 0.06 at most from here up (docs/gate.md)
PAPER = frozenset(
    {"mmlu", "gsm8k", "humaneval", "bbh"}
)  # whose unweighted mean the paper gives; a part has another name
BILLION = 1e9
MOST_CUT = 0.2  # share of held-out answers, as evaluation.harness flags it of a benchmark's


@dataclass(frozen=True)
class Evidence:
    """What was measured of one model. Rewards and lengths are keyed by row id."""

    results: Sequence[BenchmarkResult] = ()
    rewards: Mapping[str, float] = field(default_factory=dict)
    lengths: Mapping[str, float] = field(default_factory=dict)  # characters of the held-out answer
    parameters: int = 0
    cut_share: float = 0.0  # of the held-out answers: those that the token cap ended


@dataclass(frozen=True)
class Heldout:
    """Held-out prompts in the order of their names: both models' rewards, and what their answers took."""

    names: list[str]
    rewards: Pairs
    lengths: Pairs | None


def decide(
    policy: GatePolicy,
    *,
    challenger: Evidence,
    champion: Evidence,
    same_model: bool,
    prompts: Mapping[str, str] | None = None,
    noise: Mapping[str, Sequence[Noise]] | None = None,
    contamination: Sequence[Contamination] = (),
    looks: Sequence[Look] = (),
    inputs: Mapping[str, str] | None = None,
) -> Verdict:
    """Return the sealed verdict on two models' results over the same items and the same held-out prompts.

    `prompts` names the prompt of each row where several rows may share one; their rewards are averaged first, since answers to
    one prompt are not independent. `noise` is the champion's by benchmark, `contamination` what the challenger's training data hold
    of each, `looks` when this gate was asked before this year on other evidence, `inputs` the digest of each thing weighed. ValueError for results that cannot be compared.
    """
    alpha = policy.alpha_of_a_look
    pairs = _pair_benchmarks(challenger.results, champion.results)
    heldout = _pair_heldout(challenger, champion, prompts=prompts)
    _check_measured(policy, pairs, heldout, weighed=bool(challenger.parameters and champion.parameters))
    deciding, audited = _split_items(pairs, challenger.results, share=policy.audit_share)
    judged, apart = _split_prompts(heldout, share=policy.audit_share)
    guards = tuple(
        weigh.compare_guard(name, deciding[name], margin=margin, alpha=alpha) for name, margin in policy.margins.items()
    )
    targets = _compare_targets(policy, deciding, judged)
    targets = tuple(weigh.add_promotable_gain(target, guards, targets=len(targets), alpha=alpha) for target in targets)
    floors = tuple(_compare_floor(name, floor, deciding, judged, alpha=alpha) for name, floor in policy.floors.items())
    growths = _compare_growths(policy, judged, challenger, champion)
    spent = count_looks(policy, looks)
    decision, reasons = conclude(
        guards, targets=targets, floors=floors, growths=growths, looks=spent, same_model=same_model
    )
    floor = {name: tuple(found) for name, found in (noise or {}).items()}
    whole = pairs.keys() >= PAPER and all(
        _limit(each) is None for each in challenger.results if each.benchmark in PAPER
    )
    verdict = Verdict(
        decision=decision,
        reasons=reasons,
        flags=(
            *_flag(policy, guards, targets, measured=pairs.keys(), results=challenger.results, looks=spent),
            *(
                flag
                for who, side in (("champion", champion), ("challenger", challenger))
                for flag in flag_evidence(who, side)
            ),
            *flag_noise(floor, guards, targets),
            *(flag for found in contamination for flag in flag_contamination(found)),
        ),
        guards=guards,
        targets=targets,
        floors=floors,
        growths=growths,
        mean=weigh.average_benchmarks({name: deciding[name] for name in sorted(PAPER)}, alpha=alpha)
        if whole and all(deciding[name].binary for name in PAPER)
        else None,
        noise=floor,
        audit=_audit(guards, targets, audited, apart, alpha=alpha),
        looks=spent,
        same_model=same_model,
        policy=policy,
        inputs=dict(inputs or {}),
    )
    return seal(verdict)


def conclude(
    guards: Sequence[GuardVerdict],
    *,
    targets: Sequence[TargetVerdict],
    looks: Looks,
    same_model: bool,
    floors: Sequence[FloorVerdict] = (),
    growths: Sequence[GrowthVerdict] = (),
) -> tuple[Decision, tuple[str, ...]]:
    """Return the decision and the reasons that made it."""
    if same_model:
        return Decision.hold, ("challenger and champion are the same model: there is nothing to promote",)
    if looks.exhausted:
        return Decision.hold, (
            f"planned looks of this year have spent {looks.alpha_spent:.3g} of its error of {looks.alpha_of_a_year:g}, and one of "
            f"{looks.planned} would take {looks.alpha_of_a_look:.3g} more; plan more looks for the next year, or wait for it",
        )
    bad = [guard.reason for guard in guards if guard.state is GuardState.inferior]
    bad += [floor.reason for floor in floors if floor.state is BoundState.broken]
    if bad:
        return Decision.reject, tuple(bad)
    bought = [growth.reason for growth in growths if growth.name == weigh.LENGTH and not growth.holds]
    counts = [target for target in targets if not (bought and target.name == HELDOUT_REWARD)]
    shown = [target.reason for target in counts if target.superior]
    open_ends = [guard.reason for guard in guards if guard.state is GuardState.undecided]
    open_ends += [floor.reason for floor in floors if floor.state is BoundState.undecided]
    open_ends += [] if shown else [*(target.reason for target in targets if not target.superior), *bought]
    open_ends += [growth.reason for growth in growths if growth.name == weigh.COST and not growth.holds]
    if open_ends:
        return Decision.hold, tuple(open_ends)
    kept = [guard.reason for guard in guards] + [floor.reason for floor in floors]
    return Decision.promote, (*shown, *kept, *(growth.reason for growth in growths))


def measure_noise(runs: Sequence[BenchmarkResult], *, varied: str) -> Noise:
    """Return the noise floor of one model on one benchmark from runs of the same items that vary only the thing named.

    Profiles are not compared: that a few-shot seed or a batch size differs is what is measured.
    """
    names, items = {run.benchmark for run in runs}, {frozenset(run.items) for run in runs}
    if len(names) != 1 or len(items) != 1:
        raise ValueError(
            f"noise floor: runs must be of one benchmark and the same items; got {sorted(names)} with {len(items)} sets of items"
        )
    keys = sorted(runs[0].items)
    found = statistics.measure_noise([[run.items[key] for key in keys] for run in runs])
    return Noise(varied=varied, runs=found.runs, flip_rate=found.flip_rate, max_difference=found.max_difference)


def flag_guard(guard: GuardVerdict) -> list[str]:
    """Return what a reader should know before believing this guard."""
    flags = []
    if guard.margin < guard.smallest_margin:
        flags.append(
            f"{guard.benchmark}: {guard.n} items at discordance {guard.discordance:.3f} can hold a margin of "
            f"{100 * guard.smallest_margin:.1f} points or more; the policy's {100 * guard.margin:g} would often hold back "
            "an equal model"
        )
    if guard.champion == 0 or guard.challenger == 0:
        who = (
            "both models" if guard.champion == guard.challenger else "champion" if guard.champion == 0 else "challenger"
        )
        flags.append(
            f"{guard.benchmark}: {who} scored 0 on all {guard.n} items; look at the samples before believing it"
        )
    if guard.n < FEW_ITEMS and guard.method == TANGO:
        flags.append(f"{guard.benchmark}: {guard.n} items are few; the test can err in 9 % of cases where 5 % is asked")
    if guard.discordance == 0:
        flags.append(f"{guard.benchmark}: both models score alike on every one of {guard.n} items")
    return flags


def flag_noise(
    noise: Mapping[str, Sequence[Noise]], guards: Sequence[GuardVerdict], targets: Sequence[TargetVerdict]
) -> list[str]:
    """Return which differences and bounds are no larger than what moves a score when no model changes."""
    held = [(guard.benchmark, guard.difference, "margin", guard.margin) for guard in guards]
    held += [(t.name, t.gain, "gain to exceed", t.min_gain or math.inf) for t in targets if t.unit == ITEMS]
    return [
        f"{explain_noise(name, floor)}: the difference of {100 * difference:+.1f}"
        + (f" or the {what} of {100 * bound:g}" if math.isfinite(bound) else "")
        + " is within that noise"
        for name, difference, what, bound in held
        for floor in noise.get(name, ())
        if floor.max_difference >= min(bound, max(abs(difference), 1e-12))
    ]


def flag_target(target: TargetVerdict) -> list[str]:
    """Return what a reader should know before believing the target."""
    if target.sd == 0 and (target.discordance is None or target.gain == 0):
        return [
            f"{target.name}: the gain is {target.gain:+.4f} on every one of {target.n} {target.unit}; without spread nothing can be shown"
        ]
    if target.unit == PROMPTS and (target.p_value <= (1 - target.confidence) / 2) != (
        target.bootstrap_low > target.min_gain
    ):
        return [
            f"{target.name}: paired t [{target.low:+.4f}, {target.high:+.4f}] and bootstrap [{target.bootstrap_low:+.4f}, "
            f"{target.bootstrap_high:+.4f}] disagree about a gain above {target.min_gain:g}; the t interval decides"
        ]
    return []


def flag_evidence(who: str, evidence: Evidence) -> list[str]:
    """Return what the measurements of one model say against themselves."""
    flags = [f"{row.benchmark}, {who}: {row.flag}" for result in evidence.results for row in result.scores if row.flag]
    if evidence.cut_share > MOST_CUT:
        flags.append(
            f"held-out answers, {who}: {evidence.cut_share:.0%} were ended by the token cap, so their lengths are the cap's, which the "
            "bound on length cannot see beyond, and their rewards are of unfinished texts; raise heldout.max_new_tokens"
        )
    return flags


def write_verdict(verdict: Verdict, path: Path) -> None:
    """Write verdict.json atomically."""
    write_json(path, verdict.model_dump(mode="json"))


def _flag(
    policy: GatePolicy,
    guards: Sequence[GuardVerdict],
    targets: Sequence[TargetVerdict],
    *,
    measured: Iterable[str],
    results: Sequence[BenchmarkResult],
    looks: Looks,
) -> list[str]:
    flags = [flag for guard in guards for flag in flag_guard(guard)]
    flags += [flag for target in targets for flag in flag_target(target)]
    if not guards:
        flags.append("no benchmark is guarded: nothing stops a challenger that forgot everything else")
    named = {*policy.margins, *policy.targets, *policy.floors}
    flags += [f"{name} was measured and is not guarded" for name in sorted(set(measured) - named)]
    limits = {result.benchmark: limit for result in results if (limit := _limit(result)) is not None}
    if limits:
        cut = ", ".join(f"{name} ({limit} items per task)" for name, limit in limits.items())
        flags.append(f"limited, and so no full score: {cut}")
    if not looks.exhausted and looks.chance is not None and looks.chance > looks.alpha_of_a_year * (1 + 1e-9):
        flags.append(
            f"this is look {looks.spent + 1} of the year, at {looks.alpha_of_a_look:.3g}: by what is on record, the chance that at least one "
            f"of them promotes a model that is no better is up to {100 * looks.chance:.3g} %, and not {100 * looks.alpha_of_a_year:g} %; plan the looks of a "
            "year beforehand"
        )
    return flags


def _limit(result: BenchmarkResult) -> int | None:
    limit: int | None = result.profile.get("config", {}).get("limit")
    return limit


def _pair_benchmarks(challenger: Sequence[BenchmarkResult], champion: Sequence[BenchmarkResult]) -> dict[str, Pairs]:
    ours, theirs = ({result.benchmark: result for result in side} for side in (challenger, champion))
    assert len(ours) == len(challenger) and len(theirs) == len(champion), "a benchmark is given twice"
    if ours.keys() != theirs.keys():
        raise ValueError(
            f"gate: both models need the same benchmarks; only the challenger has {sorted(ours.keys() - theirs.keys())}, "
            f"only the champion has {sorted(theirs.keys() - ours.keys())}; evaluate both on the same suite"
        )
    unproven = sorted(
        name for side in (ours, theirs) for name in side if "unverified" in side[name].profile.get(MODEL_FIELD, {})
    )
    if unproven:
        raise ValueError(
            f"gate: the scores of {', '.join(dict.fromkeys(unproven))} are of a model behind an endpoint, and nothing proves which; expected "
            "scores of weights with a digest; evaluate with the backend transformers or vllm"
        )
    return {name: Pairs(*pair_items(ours[name], theirs[name]), theirs[name].strata) for name in sorted(ours)}


def _pair_heldout(challenger: Evidence, champion: Evidence, *, prompts: Mapping[str, str] | None) -> Heldout:
    for what, ours, theirs in (
        ("rewards", challenger.rewards, champion.rewards),
        ("lengths", challenger.lengths, champion.lengths),
    ):
        only = [len(ours.keys() - theirs.keys()), len(theirs.keys() - ours.keys())]
        if any(only):
            raise ValueError(
                f"gate: held-out {what} must be of the same rows; {only[0]} of {len(ours)} are the challenger's alone "
                f"and {only[1]} of {len(theirs)} the champion's alone; generate and score both from the same rows"
            )
        for who, side in (("challenger", ours), ("champion", theirs)):
            bad = [row for row, value in side.items() if not np.isfinite(value)]
            if bad:
                raise ValueError(
                    f"gate: {len(bad)} of {len(side)} held-out {what} of the {who} are not finite (first: row {bad[0]}); look at "
                    "what the reward model says of that row, and leave out or mend what it cannot score"
                )
    rows = sorted(challenger.rewards)
    if len(rows) < 2:
        raise ValueError(f"gate: at least 2 held-out prompts are needed for an interval; got {len(rows)}")
    unnamed = [row for row in rows if prompts is not None and row not in prompts]
    if unnamed:
        raise ValueError(
            f"gate: {len(unnamed)} of {len(rows)} rows have a reward and no prompt (first: {unnamed[0]}); generate and score both from "
            "the same rows"
        )
    names = [prompts[row] for row in rows] if prompts is not None else rows
    if len(set(names)) < 2:
        raise ValueError(f"gate: at least 2 held-out prompts are needed for an interval; got 1 in {len(rows)} rows")

    def average(ours: Mapping[str, float], theirs: Mapping[str, float]) -> Pairs:
        sides = (statistics.average_clusters([side[row] for row in rows], names) for side in (ours, theirs))
        return pair_scores(*sides)

    lengths = None
    if challenger.lengths:
        missing = [row for row in rows if row not in challenger.lengths]
        if missing:
            raise ValueError(
                f"gate: {len(missing)} of {len(rows)} rows have a reward and no answer length (first: {missing[0]}); "
                "generate and score both from the same rows"
            )
        lengths = average(challenger.lengths, champion.lengths)
    return Heldout(sorted(set(names)), average(challenger.rewards, champion.rewards), lengths)


def _check_measured(policy: GatePolicy, pairs: Mapping[str, Pairs], heldout: Heldout, *, weighed: bool) -> None:
    for what, named in (("guarded", policy.margins), ("target", policy.targets), ("floored", policy.floors)):
        absent = sorted(named.keys() - pairs.keys() - ({HELDOUT_REWARD} if what != "guarded" else set()))
        if absent:
            raise ValueError(
                f"gate: no result of the {what} {', '.join(absent)}; got {sorted(pairs) or 'none'}; run it first"
            )
    bounds_length = policy.max_length_growth is not None and HELDOUT_REWARD in policy.targets
    if heldout.lengths is None and (bounds_length or policy.max_cost_growth is not None):
        raise ValueError(
            "gate: the policy bounds the growth of answers, and no lengths of held-out answers were given; give them, or leave "
            "max_length_growth and max_cost_growth empty"
        )
    if policy.max_cost_growth is not None and not weighed:
        raise ValueError(
            "gate: the policy bounds the cost, and the number of the models' parameters was not given; give it, or leave max_cost_growth empty"
        )


def _split_items(
    pairs: Mapping[str, Pairs], results: Sequence[BenchmarkResult], *, share: float
) -> tuple[dict[str, Pairs], dict[str, Pairs]]:
    """Return the items that decide, and those of the audit split, by benchmark."""
    if share == 0:
        return dict(pairs), {}
    deciding, apart = {}, {}
    for result in results:
        chosen_N = _choose_audit(["\x1f".join(key) for key in result.keys], share=share)
        _require_both(result.benchmark, chosen_N, share=share)
        deciding[result.benchmark] = pairs[result.benchmark].choose(~chosen_N)
        apart[result.benchmark] = pairs[result.benchmark].choose(chosen_N)
    return deciding, apart


def _split_prompts(heldout: Heldout, *, share: float) -> tuple[Heldout, Pairs | None]:
    if share == 0:
        return heldout, None
    chosen_N = _choose_audit(heldout.names, share=share)
    _require_both("held-out prompts", chosen_N, share=share)
    kept = [name for name, chosen in zip(heldout.names, chosen_N, strict=True) if not chosen]
    lengths = heldout.lengths.choose(~chosen_N) if heldout.lengths else None
    return Heldout(kept, heldout.rewards.choose(~chosen_N), lengths), heldout.rewards.choose(chosen_N)


def _choose_audit(names: Sequence[str], *, share: float) -> NDArray[np.bool_]:
    """Return which names are in the audit split: a hash decides, so that an item is in it in every run or in none."""
    heads = (hashlib.sha256(name.encode()).digest()[:8] for name in names)
    return np.array([int.from_bytes(head, "big") / 2**64 < share for head in heads])


def _require_both(what: str, chosen_N: NDArray[np.bool_], *, share: float) -> None:
    audited = int(chosen_N.sum())
    if audited < 2 or len(chosen_N) - audited < 2:
        raise ValueError(
            f"gate: an audit share of {share:g} puts {audited} of {len(chosen_N)} {what} aside; at least 2 have to be on either side; "
            "take more, or set audit_share to 0"
        )


def _compare_targets(policy: GatePolicy, pairs: Mapping[str, Pairs], heldout: Heldout) -> tuple[TargetVerdict, ...]:
    alpha, rewards = policy.alpha_of_a_look, heldout.rewards
    gain_N = rewards.challenger_N - rewards.champion_N
    levels = (float(rewards.challenger_N.mean()), float(rewards.champion_N.mean()))
    compared = [
        weigh.compare_target(name, gain_N, levels=levels, alpha=alpha, min_gain=min_gain)
        if name == HELDOUT_REWARD
        else weigh.compare_benchmark(name, pairs[name], alpha=alpha, min_gain=min_gain)
        for name, min_gain in policy.targets.items()
    ]
    return weigh.adjust_targets(compared, alpha=alpha)


def _compare_floor(
    name: str, floor: float, pairs: Mapping[str, Pairs], heldout: Heldout, *, alpha: float
) -> FloorVerdict:
    if name == HELDOUT_REWARD:
        return weigh.compare_floor(name, heldout.rewards.challenger_N, floor=floor, unit=PROMPTS, alpha=alpha)
    return weigh.compare_floor(name, pairs[name].challenger_N, floor=floor, unit=ITEMS, alpha=alpha)


def _compare_growths(
    policy: GatePolicy, heldout: Heldout, challenger: Evidence, champion: Evidence
) -> tuple[GrowthVerdict, ...]:
    alpha, lengths, found = policy.alpha_of_a_look, heldout.lengths, []
    if lengths is None:
        return ()
    if policy.max_length_growth is not None and HELDOUT_REWARD in policy.targets:
        growth = weigh.compare_growth(
            weigh.LENGTH, lengths.challenger_N, lengths.champion_N,
            bound=policy.max_length_growth, unit="characters", alpha=alpha,
        )  # fmt: skip
        gain_N = heldout.rewards.challenger_N - heldout.rewards.champion_N
        growth_N = lengths.challenger_N - lengths.champion_N
        min_gain = policy.targets[HELDOUT_REWARD]
        found.append(weigh.weigh_length(growth, gain_N, growth_N, min_gain=min_gain, alpha=alpha))
    if policy.max_cost_growth is not None:
        ours, theirs = challenger.parameters / BILLION, champion.parameters / BILLION
        cost = weigh.compare_growth(
            weigh.COST, lengths.challenger_N * ours, lengths.champion_N * theirs,
            bound=policy.max_cost_growth, unit="billions of parameters x characters", alpha=alpha,
        )  # fmt: skip
        found.append(cost)
    return tuple(found)


def _audit(
    guards: Sequence[GuardVerdict],
    targets: Sequence[TargetVerdict],
    items: Mapping[str, Pairs],
    prompts: Pairs | None,
    *,
    alpha: float,
) -> tuple[AuditRow, ...]:
    if prompts is None:
        return ()
    decided = {guard.benchmark: (guard.low, guard.high) for guard in guards}
    for target in targets:
        decided.setdefault(target.name, (target.low, target.high))
    return tuple(
        weigh.audit(name, prompts, unit=PROMPTS, decided=interval, alpha=alpha)
        if name == HELDOUT_REWARD
        else weigh.audit(name, items[name], unit=ITEMS, decided=interval, alpha=alpha)
        for name, interval in decided.items()
    )
