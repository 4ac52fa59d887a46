"""What the gate says, in closed models that serialise to verdict.json. The report, the registry and `varflow gate` read these
and nothing else."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from pydantic import Field, ValidationError

from evaluation.config import GatePolicy, Look
from training.config import Config


class Decision(StrEnum):
    """PROMOTE: every guard non-inferior, the target superior, floors and bounds shown to hold. REJECT: a guard shown worse than
    its margin, or a floor broken. HOLD: else."""

    promote = "PROMOTE"
    hold = "HOLD"
    reject = "REJECT"


class GuardState(StrEnum):
    """Where the interval of a guard lies: above minus the margin, below it, or across."""

    non_inferior = "non-inferior"
    inferior = "inferior"
    undecided = "undecided"


class BoundState(StrEnum):
    """Where the interval of a floor or bound lies: on its good side, on its bad side, or across."""

    kept = "kept"
    broken = "broken"
    undecided = "undecided"


class Noise(Config):
    """How far one model's score moves between runs that vary one thing that should not matter."""

    varied: str  # few-shot seed, batch size, number of workers, or the judge's draw
    runs: int
    flip_rate: float  # share of items whose score differs between two runs
    max_difference: float  # of the score between two runs


class GuardVerdict(Config):
    """One guarded benchmark: paired scores of both models on the same items, from 0 to 1, challenger minus champion."""

    benchmark: str
    state: GuardState
    n: int
    champion: float
    challenger: float
    difference: float
    low: float  # of the interval of two-sided `confidence`; its lower end is the one-sided test at alpha
    high: float
    confidence: float
    margin: float
    method: str  # Tango score interval, or paired t
    won: int  # items on which the challenger scores higher
    lost: int
    discordance: float  # (won + lost) / n
    p_difference: float  # two-sided p of no difference: mid-p McNemar, or paired t
    detectable_difference: float  # at this discordance, one-sided alpha and power 0.8
    smallest_margin: float  # lets equal models pass with 95 % at this n and discordance
    items_to_decide: (
        int | None
    )  # with power 0.8 if the observed rates are the true ones; None when decided, or when none would
    strata: int  # tasks of the benchmark, such as MMLU's subjects
    stratified_low: (
        float  # the interval with the spread within the tasks alone; decides only where scores are no 0 or 1
    )
    stratified_high: float
    reason: str


class TargetVerdict(Config):
    """What must be better with confidence: a mean over prompts or items, challenger minus champion."""

    name: str
    superior: bool
    unit: str  # prompts, or items
    method: str
    n: int
    champion: float
    challenger: float
    gain: float
    low: float
    high: float
    confidence: float
    min_gain: float
    p_value: float  # one-sided, of a gain above min_gain
    p_adjusted: float  # by Holm, for any one of several targets; the same where one is named
    sd: float  # of the differences between prompts or items
    discordance: float | None  # share of items on which the models differ; None where scores are not 0 or 1
    bootstrap_low: float
    bootstrap_high: float
    detectable_gain: float  # beyond min_gain, at this spread, with power 0.8
    promotable_gain: float | None = (
        None  # true gain at which this gate promotes with power 0.8 if no guard moves; None: at none
    )
    statistic: float | None = None  # of the gain beyond min_gain, in standard errors; None in verdicts of version 3
    more_to_decide: int | None  # prompts or items, at what Holm asks of one target more
    reason: str


class FloorVerdict(Config):
    """A level of the challenger alone, against its floor."""

    name: str
    state: BoundState
    unit: str
    n: int
    level: float
    low: float
    high: float
    confidence: float
    floor: float
    more_to_decide: int | None
    reason: str


class GrowthVerdict(Config):
    """How much more of something the challenger's answers take, against the bound; over held-out prompts."""

    name: str  # length or cost
    state: BoundState
    unit: str  # of champion, challenger, low and high
    n: int
    champion: float  # mean
    challenger: float
    bound: float
    growth: float | None  # challenger / champion - 1; None where the champion's answers are all empty
    low: float  # of the interval of the mean of challenger - (1 + bound) champion: below 0 the bound is shown to hold
    high: float
    confidence: float
    more_to_decide: int | None
    gain_at_equal_length: float | None = None  # of the reward, with its interval; of length alone
    gain_low: float | None = None
    gain_high: float | None = None
    holds: bool  # whether this bound lets a promotion pass
    reason: str


class MeanVerdict(Config):
    """The unweighted mean of all four benchmarks of the paper in full, for the reader; decides nothing."""

    champion: float
    challenger: float
    difference: float
    low: float
    high: float
    confidence: float
    detectable_difference: float


class AuditRow(Config):
    """A guard or a target on the items or prompts of the audit split, which never decide."""

    name: str
    unit: str
    n: int
    difference: float
    low: float
    high: float
    confidence: float
    agrees: bool  # its interval and the deciding one have a value in common


class Looks(Config):
    """What this look may spend of the year's error, and what was spent before it."""

    spent: int  # looks before this one
    planned: int | None
    alpha_of_a_look: float
    alpha_of_a_year: float
    alpha_spent: float | None = None  # by the planned ones before this one; None in verdicts of version 3
    chance: float | None = (
        None  # that this look or one before it promotes falsely, if each is of equal models; likewise
    )

    @property
    def exhausted(self) -> bool:
        """Whether this look would take planned looks beyond the year's error."""
        together = (self.alpha_spent or 0.0) + self.alpha_of_a_look
        return self.planned is not None and together > self.alpha_of_a_year * (1 + 1e-9)


def count_looks(policy: GatePolicy, before: Sequence[Look]) -> Looks:
    """Return a look under this policy as the one after others of its year."""
    alpha = policy.alpha_of_a_look
    return Looks(
        spent=len(before), planned=policy.planned_looks, alpha_of_a_look=alpha, alpha_of_a_year=policy.alpha,
        alpha_spent=math.fsum(look.alpha for look in before if look.planned),
        chance=-math.expm1(math.fsum(math.log1p(-each) for each in (*(look.alpha for look in before), alpha))),
    )  # fmt: skip


class Verdict(Config):
    """The gate's answer with everything it rests on. `reasons` decide, `flags` warn, `seal` shows that neither was touched."""

    decision: Decision
    reasons: tuple[str, ...]
    flags: tuple[str, ...]
    guards: tuple[GuardVerdict, ...]
    targets: tuple[TargetVerdict, ...]
    floors: tuple[FloorVerdict, ...] = ()
    growths: tuple[GrowthVerdict, ...] = ()
    mean: MeanVerdict | None = None
    noise: dict[str, tuple[Noise, ...]] = Field({})  # of the champion, by benchmark; empty where it was not measured
    audit: tuple[AuditRow, ...] = ()
    looks: Looks
    same_model: bool
    policy: GatePolicy
    inputs: dict[str, str]  # what was weighed -> sha256 of it
    seal: str = ""

    @property
    def alpha(self) -> float:
        """The one-sided error rate of each test."""
        return self.looks.alpha_of_a_look

    def target(self, name: str) -> TargetVerdict | None:
        """Return one target by name, None where the policy does not name it."""
        return next((target for target in self.targets if target.name == name), None)


class OlderVerdictError(ValueError):
    """A verdict.json that another version of the gate wrote, which this one cannot read."""


def compute_seal(fields: Mapping[str, Any]) -> str:
    """Return sha256 of a verdict's canonical JSON without its seal: sorted keys, no white space, UTF-8 (docs/gate.md)."""
    content = {name: value for name, value in fields.items() if name != "seal"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def seal(verdict: Verdict) -> Verdict:
    """Return the verdict with its seal."""
    return verdict.model_copy(update={"seal": compute_seal(verdict.model_dump(mode="json"))})


def read_verdict(text: str | bytes, *, kept: str | None = None) -> Verdict:
    """Return the verdict of a verdict.json whose seal holds and, where `kept` elsewhere, is that one.

    The seal is computed from the text's own fields, so it outlives new fields of this model. Raises OlderVerdictError where another
    version wrote it, ValueError where it was changed.
    """
    fields = json.loads(text)
    if not isinstance(fields, dict) or "seal" not in fields or "looks" not in fields:
        raise OlderVerdictError(
            "verdict.json: got one without seal, as gates before version 2 wrote it; run the gate again (the same command) to have one"
        )
    held, found = str(fields["seal"]), compute_seal(fields)
    if found != held:
        raise ValueError(
            f"verdict {fields.get('decision')}: its seal is {held[:16] or 'missing'}, its content gives {found[:16]}: it was changed "
            "after the gate wrote it; run the gate again and do not act on this one"
        )
    if kept not in (None, held):
        raise ValueError(
            f"verdict {fields.get('decision')}: its seal is {held[:16]}, its record has {str(kept)[:16]}: the file was replaced after the gate "
            "wrote it; run the gate again and do not act on this one"
        )
    try:
        return Verdict.model_validate_json(text)
    except ValidationError as error:
        wrong = sorted({".".join(map(str, fault["loc"])) for fault in error.errors()})
        raise OlderVerdictError(
            f"verdict.json: its seal holds, and its fields are those of another version of the gate ({', '.join(wrong[:3])}); run the gate again "
            "(the same command) to have one of this version"
        ) from error


def check_inputs(verdict: Verdict, inputs: Mapping[str, str]) -> None:
    """Raise ValueError, naming what differs, when a verdict rests on other `inputs` than these."""
    changed = sorted(
        name for name in inputs.keys() | verdict.inputs.keys() if inputs.get(name) != verdict.inputs.get(name)
    )
    if changed:
        raise ValueError(
            f"verdict {verdict.decision}: {len(changed)} of its inputs are not what it weighed: {', '.join(changed[:5])}; run the gate "
            "again on what is there now"
        )
