"""The normaliser cross_batch: Z of a prompt over all responses of the batch, each put under that prompt (docs/var.md).

It needs rewards and reference log-probabilities of every (prompt, response) pair of a batch: matrices scored beforehand.
"""

import numpy as np

from training.objectives.objective import FloatArray

# G prompts and N responses of a global batch


def cross_batch_weights(
    reward_GN: FloatArray, base_GN: FloatArray, group_N: np.ndarray, *, lambda_: float
) -> FloatArray:
    """Return w_i = N exp(s_ii - log Z_i) / sum_i exp(s_ii - log Z_i), Z_i = sum_j exp s(x_i, y_j), s = base + reward / lambda.

    A prompt's largest reward is taken off before the division, which cancels in s_ii - log Z_i. ValueError where every response is
    so far behind foreign ones that no weight is left.
    """
    from scipy.special import logsumexp

    with np.errstate(over="ignore"):
        score_GN = base_GN + (reward_GN - reward_GN.max(axis=1, keepdims=True)) / lambda_
    N = len(group_N)
    own_N = score_GN[group_N, np.arange(N)] - logsumexp(score_GN, axis=1)[group_N]
    if not np.isfinite(own_N.max()):
        raise ValueError(
            f"normaliser cross_batch: under every prompt responses of other prompts have all the weight at lambda {lambda_:g}; "
            "expected a prompt whose own response counts; raise lambda, or normalise per_prompt"
        )
    exp_N = np.exp(own_N - own_N.max())
    weights: FloatArray = N * exp_N / exp_N.sum()
    return weights
