"""The parts of a verdict in words and numbers: each sentence says what was tested, on how much, with what result, and what would
decide it."""

from evaluation.gate.verdict import (
    BoundState,
    FloorVerdict,
    GrowthVerdict,
    GuardState,
    GuardVerdict,
    Noise,
    TargetVerdict,
)


def explain_guard(guard: GuardVerdict) -> str:
    """Return the reason of a guard."""
    numbers = (
        f"{100 * guard.champion:.1f} → {100 * guard.challenger:.1f} on {guard.n} items, difference "
        f"{100 * guard.difference:+.1f} [{100 * guard.low:+.1f}, {100 * guard.high:+.1f}] points at {show_share(guard.confidence)}, "
        f"detectable {100 * guard.detectable_difference:.1f}"
    )
    margin = f"{100 * guard.margin:g} points"
    if guard.state is GuardState.non_inferior:
        return f"{guard.benchmark}: not worse by {margin} or more: {numbers}"
    if guard.state is GuardState.inferior:
        return f"{guard.benchmark}: shown worse than the margin of {margin}: {numbers}"
    return f"{guard.benchmark}: undecided against the margin of {margin}: {numbers}; {would_decide(guard.items_to_decide, 'items', 'decide')}"


def explain_target(target: TargetVerdict) -> str:
    """Return the reason of a target."""
    points = 100 if target.unit == "items" else 1
    digits = 1 if target.unit == "items" else 3
    bound = f" above {points * target.min_gain:g}{' points' if points > 1 else ''}" if target.min_gain else ""
    numbers = (
        f"{points * target.champion:.{digits}f} → {points * target.challenger:.{digits}f} over {target.n} {target.unit}, gain "
        f"{points * target.gain:+.{digits}f} [{points * target.low:+.{digits}f}, {points * target.high:+.{digits}f}]"
        f"{' points' if points > 1 else ''} at {show_share(target.confidence)}, p {show_p(target.p_value)}"
    )
    if target.promotable_gain is not None:
        numbers += (
            f"; with these guards a true gain of {points * target.promotable_gain:.4g} would be promoted 4 times in 5"
        )
    if target.p_adjusted != target.p_value:
        numbers += f"; p {show_p(target.p_adjusted)} with Holm's adjustment for any of several targets"
    if target.superior:
        return f"{target.name}: a gain{bound} is shown: {numbers}"
    return f"{target.name}: a gain{bound} is not shown: {numbers}; {would_decide(target.more_to_decide, target.unit, 'show')}"


def explain_floor(floor: FloorVerdict) -> str:
    """Return the reason of a floor."""
    points, digits = (100, 1) if floor.unit == "items" else (1, 3)
    numbers = (
        f"{points * floor.level:.{digits}f} over {floor.n} {floor.unit} [{points * floor.low:.{digits}f}, "
        f"{points * floor.high:.{digits}f}] at {show_share(floor.confidence)}"
    )
    level = f"{points * floor.floor:g}"
    if floor.state is BoundState.kept:
        return f"{floor.name}: shown above its floor of {level}: {numbers}"
    if floor.state is BoundState.broken:
        return f"{floor.name}: shown below its floor of {level}: {numbers}"
    return f"{floor.name}: undecided against its floor of {level}: {numbers}; {would_decide(floor.more_to_decide, floor.unit, 'decide')}"


def explain_growth(growth: GrowthVerdict) -> str:
    """Return the reason of a bound on length or cost."""
    numbers = (
        f"{growth.champion:.4g} → {growth.challenger:.4g} {growth.unit} over {growth.n} prompts, {show_growth(growth)}"
    )
    bound = f"{100 * growth.bound:g} %"
    if growth.state is BoundState.kept:
        said = f"{growth.name}: shown to grow by less than {bound}: {numbers}"
    elif growth.state is BoundState.broken:
        said = f"{growth.name}: shown to grow by more than {bound}: {numbers}"
    else:
        said = f"{growth.name}: undecided against the bound of {bound}: {numbers}; {would_decide(growth.more_to_decide, 'prompts', 'decide')}"
    if growth.name != "length" or growth.state is BoundState.kept:
        return said
    if growth.gain_at_equal_length is None:
        return f"{said}; all answers grew alike, so what length alone earned cannot be told from the gain"
    interval = f"{growth.gain_at_equal_length:+.3f} [{growth.gain_low:+.3f}, {growth.gain_high:+.3f}]"
    if growth.holds:
        return f"{said}; the reward's gain at equal length is shown all the same: {interval}"
    return f"{said}, and at equal length no gain of the reward is shown: {interval}; longer answers may be all that was learnt"


def explain_noise(benchmark: str, noise: Noise, *, whose: str = "the champion") -> str:
    """Return how far a benchmark's score moved when no model changed."""
    return (
        f"{benchmark}: {noise.runs} runs of {whose} alone that vary {noise.varied} differ by up to "
        f"{100 * noise.max_difference:.1f} points ({noise.flip_rate:.1%} of items flip between two)"
    )


def show_growth(growth: GrowthVerdict) -> str:
    """Return a growth in percent."""
    return "the champion's are all empty" if growth.growth is None else f"{100 * growth.growth:+.1f} %"


def would_decide(more: int | None, unit: str, verb: str) -> str:
    """Return what number of items or prompts would decide."""
    if more is None:
        return f"no number of {unit} at these rates would {verb} it"
    return f"about {more} {unit} at these rates would {verb} it"


def show_share(share: float) -> str:
    """Return a confidence in percent, with the digits that a small alpha needs."""
    return f"{100 * share:.6g}%"


def show_p(p_value: float) -> str:
    """Return a p-value with its sign."""
    return f"= {p_value:.2g}" if p_value >= 1e-4 else "< 0.0001"
