"""The interval of one model's score alone; what compares two models is in evaluation.statistics."""

from collections.abc import Sequence

import numpy as np
from scipy import stats


def score_interval(items: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval of a mean of item scores from 0 to 1: Wilson's where each is 0 or 1, else Student's, kept within 0 and 1.

    Of one item that is neither 0 nor 1 nothing is known: (0, 1).
    """
    score_N = np.asarray(items, dtype=np.float64)
    if np.isin(score_N, (0, 1)).all():
        interval = stats.binomtest(int(score_N.sum()), len(score_N)).proportion_ci(confidence, method="wilson")
        return float(interval.low), float(interval.high)
    if len(score_N) < 2:
        return 0.0, 1.0
    error = score_N.std(ddof=1) / np.sqrt(len(score_N))
    reach = float(stats.t.ppf((1 + confidence) / 2, len(score_N) - 1) * error)
    return max(0.0, float(score_N.mean()) - reach), min(1.0, float(score_N.mean()) + reach)
