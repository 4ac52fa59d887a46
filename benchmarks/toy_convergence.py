"""Draw docs/figures/toy_convergence.svg: how close VAR comes to its closed-form optimum where all responses can be listed.

`python -m benchmarks.toy_convergence [FILE]`. One prompt, forty responses of one to eight tokens, a policy with one logit a response; the
weights are those of `training.objectives.var`. Left: gradient steps on the whole set, scored as `support`. Right: K samples of the
reference, scored as what they are (`from_reference`) and, wrongly, as `support`; the mean over 200 draws at the optimum of the loss.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np

from training.config import ResponseRegime
from training.objectives.objective import Columns, FloatArray
from training.objectives.var import Normaliser, ReferenceFactor, Var

matplotlib.use("svg")
from matplotlib import pyplot as plt

RESPONSES, LAMBDA, STEPS, DRAWS = 40, 0.7, 2000, 200
GROUP_SIZES = (2, 4, 8, 16, 32, 64, 128, 256)


def main() -> None:
    """Compute both panels and write the figure."""
    rng = np.random.default_rng(0)
    length_R, logp_R, reward_R, best_R = draw_space(rng)
    matplotlib.rcParams["svg.hashsalt"] = "varflow"  # the same file each time
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for label, weight_R in {
        "sum over all tokens": weigh(ResponseRegime.support, logp_R, reward_R, length_R),
        "divided by each response's own length": weigh(ResponseRegime.support, logp_R, reward_R, length_R) / length_R,
    }.items():
        left.plot(descend(weight_R, logp_R, best_R), label=label)
    left.set(yscale="log", xlabel="gradient step", ylabel="total variation to pi*", title="support, the whole set")
    for regime in (ResponseRegime.from_reference, ResponseRegime.support):
        gaps = [mean_gap(regime, size, logp_R, reward_R, length_R, best_R, rng) for size in GROUP_SIZES]
        right.plot(GROUP_SIZES, gaps, marker="o", label=f"scored as {regime.value}")
    right.set(xscale="log", yscale="log", xlabel="samples of the reference, K", title="K samples of the reference")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(
        Path(sys.argv[1] if len(sys.argv) > 1 else "docs/figures/toy_convergence.svg"), metadata={"Date": None}
    )


def draw_space(rng: np.random.Generator) -> tuple[np.ndarray, FloatArray, FloatArray, FloatArray]:
    """Return (length_R, logp_R, reward_R, best_R) of all responses that there are: tokens, log pi_ref, rewards, and pi*."""
    length_R = rng.integers(1, 9, size=RESPONSES)
    logp_R = -length_R * rng.uniform(0.3, 1.2, size=RESPONSES)
    logp_R -= np.log(np.exp(logp_R).sum())
    reward_R = rng.normal(size=RESPONSES)
    return length_R, logp_R, reward_R, softmax(logp_R + reward_R / LAMBDA)


def weigh(regime: ResponseRegime, logp_R: FloatArray, reward_R: FloatArray, length_R: np.ndarray) -> FloatArray:
    """Return the weights of one prompt's responses."""
    objective = Var(
        lambda_=LAMBDA, regime=regime, normaliser=Normaliser.per_prompt, reference_factor=ReferenceFactor.sum
    )
    columns = Columns(
        row_ids=("toy",),
        group_R=np.zeros(len(logp_R), dtype=np.int64),
        num_tokens_R=length_R,
        reward_R=reward_R,
        logp_ref_R=logp_R,
    )
    return objective.weigh(columns)


def descend(weight_R: FloatArray, start_R: FloatArray, best_R: FloatArray) -> list[float]:
    """Return the total variation to the optimum after each step of gradient descent on the weighted loss."""
    logit_R, gaps = start_R.copy(), []
    target_R = weight_R / weight_R.sum()
    for _ in range(STEPS):
        policy_R = softmax(logit_R)
        gaps.append(total_variation(policy_R, best_R))
        logit_R -= 2.0 * (policy_R - target_R)  # the gradient of - sum w log pi by the logits
    return gaps


def mean_gap(
    regime: ResponseRegime, size: int, logp_R: FloatArray, reward_R: FloatArray, length_R: np.ndarray,
    best_R: FloatArray, rng: np.random.Generator,
) -> float:  # fmt: skip
    """Return how far the loss's own optimum on K samples is from pi*, the mean over many draws."""
    gaps = []
    for _ in range(DRAWS):
        drawn = rng.choice(RESPONSES, size=size, p=np.exp(logp_R))
        weight = weigh(regime, logp_R[drawn], reward_R[drawn], length_R[drawn])
        gaps.append(total_variation(np.bincount(drawn, weights=weight / weight.sum(), minlength=RESPONSES), best_R))
    return float(np.mean(gaps))


def softmax(value_R: FloatArray) -> FloatArray:
    """Return probabilities."""
    exp_R: FloatArray = np.exp(value_R - value_R.max())
    return exp_R / exp_R.sum()


def total_variation(p_R: FloatArray, q_R: FloatArray) -> float:
    """Return half the L1 distance."""
    return float(0.5 * np.abs(p_R - q_R).sum())


if __name__ == "__main__":
    main()
