"""What can be said of a gate's policy before anything is measured: whether its margins can be held at all. No SciPy: read with
every config."""

import math
from statistics import NormalDist

from evaluation.config import HELDOUT_REWARD, BenchmarkConfig, GatePolicy, SuiteConfig

EQUAL_MODELS_POWER = (
    0.95  # a margin that n "can hold" lets equal models pass this often: 1.645 + 1.645 = 3.29 at alpha 0.05
)
TASK_SIZES = {  # lm-eval task or group -> (tasks, items)
    "mmlu": (57, 14_042),
    "gsm8k": (1, 1_319),
    "gsm8k_cot": (1, 1_319),
    "humaneval": (1, 164),
    "humaneval_instruct": (1, 164),
    "bbh_cot_fewshot": (27, 6_511),
}


def smallest_margin(n: int, *, discordance: float, alpha: float) -> float:
    """Return the smallest margin that lets equal models pass a guard of `n` items with 95 %: 3.29 sqrt(psi / n) at alpha 0.05."""
    assert n >= 1, f"{n} items have no margin"
    z = NormalDist().inv_cdf
    return (z(1 - alpha) + z(EQUAL_MODELS_POWER)) * math.sqrt(discordance / n)


def count_items(benchmark: BenchmarkConfig) -> int | None:
    """Return how many items a benchmark has, with a limit at most; None where only its files can tell."""
    sizes = [TASK_SIZES.get(task) for task in benchmark.tasks]
    if benchmark.limit is None:
        return None if None in sizes else sum(items for _, items in filter(None, sizes))
    return sum(min(benchmark.limit * tasks, items) for tasks, items in (size or (1, benchmark.limit) for size in sizes))


def flag_policy(policy: GatePolicy, suite: SuiteConfig) -> list[str]:
    """Return what is wrong with a policy that can be used all the same: margins that would hold back equal models."""
    flags = []
    for benchmark in suite.benchmarks:
        items = count_items(benchmark)
        if benchmark.name not in policy.margins or items is None:
            continue
        n = max(1, round(items * (1 - policy.audit_share)))
        margin, psi = policy.margins[benchmark.name], policy.planned_discordance
        least = smallest_margin(n, discordance=psi, alpha=policy.alpha_of_a_look)
        if margin < least:
            flags.append(
                f"{benchmark.name}: a margin of {100 * margin:g} points is below the {100 * least:.1f} that {n:,} items hold when the "
                f"models differ on {psi:.0%} of them: equal models would fail it more often than 1 in 20; widen the margin, "
                "or take more items"
            )
    return flags


def check_names(policy: GatePolicy, suite: SuiteConfig) -> None:
    """Refuse a policy that names a benchmark which the suite does not run."""
    known = [benchmark.name for benchmark in suite.benchmarks]
    unknown = {
        field: sorted(named.keys() - {*known, *also})
        for field, named, also in (
            ("margins", policy.margins, ()),
            ("targets", policy.targets, (HELDOUT_REWARD,)),
            ("floors", policy.floors, (HELDOUT_REWARD,)),
        )
    }
    wrong = ", ".join(f"{field} {', '.join(names)}" for field, names in unknown.items() if names)
    if wrong:
        raise ValueError(
            f"gate: the policy names benchmarks that the suite does not run: {wrong}; the suite runs {', '.join(known) or 'none'}; "
            "correct the name, or add the benchmark to the suite"
        )


def check_proven(suite: SuiteConfig) -> None:
    """Refuse a suite whose scores would be of a model that nobody can prove, before hours are spent on what no gate takes."""
    served = [benchmark.name for benchmark in suite.benchmarks if benchmark.endpoint]
    if served:
        raise ValueError(
            f"gate: {', '.join(served)} would be of the model behind an endpoint, not of the challenger; expected the backend transformers "
            "or vllm; `varflow benchmark` evaluates endpoints"
        )
