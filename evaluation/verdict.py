"""What the gate says, in closed models that serialise to verdict.json. The report and the registry read these and nothing else."""

from enum import StrEnum

from training.config import Config


class Decision(StrEnum):
    """PROMOTE: every guard non-inferior and the target superior. REJECT: a guard shown worse than its margin. HOLD: else."""

    promote = "PROMOTE"
    hold = "HOLD"
    reject = "REJECT"


class GuardState(StrEnum):
    """Where the interval of a guard lies: above minus the margin, below it, or across."""

    non_inferior = "non-inferior"
    inferior = "inferior"
    undecided = "undecided"


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
    reason: str


class TargetVerdict(Config):
    """What must be better with confidence: a mean over prompts, challenger minus champion."""

    name: str
    superior: bool
    n: int
    champion: float
    challenger: float
    gain: float
    low: float
    high: float
    confidence: float
    min_gain: float
    p_value: float  # one-sided, of a gain above min_gain
    sd: float  # of the differences between prompts
    bootstrap_low: float
    bootstrap_high: float
    detectable_gain: float  # beyond min_gain, at this spread, with power 0.8
    prompts_to_decide: int | None
    reason: str


class Verdict(Config):
    """The gate's answer with everything it rests on. `reasons` decide, `flags` warn."""

    decision: Decision
    reasons: tuple[str, ...]
    flags: tuple[str, ...]
    guards: tuple[GuardVerdict, ...]
    target: TargetVerdict
    same_model: bool
    alpha: float
