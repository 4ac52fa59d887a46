"""Objectives: weights worked by hand, their limits and invariances, and every refusal by name."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from training.config import ResponseRegime
from training.objectives.bradley_terry import BradleyTerry
from training.objectives.dpo import Dpo, DpoConfig
from training.objectives.objective import Columns
from training.objectives.sft import Sft
from training.objectives.transforms import RewardTransform, describe_transform
from training.objectives.var import Normaliser, ReferenceFactor, Var, VarConfig
from training.objectives.weights import check_weights, describe_weights, within_group_variance


def columns(
    rewards: list[list[float]],
    logps: list[list[float]] | None = None,
    tokens: list[list[int]] | None = None,
    logqs: list[list[float]] | None = None,
) -> Columns:
    counts = [len(r) for r in rewards]
    return Columns(
        row_ids=tuple(f"row{g}" for g in range(len(rewards))),
        group_R=np.repeat(np.arange(len(rewards)), counts),
        num_tokens_R=np.concatenate(tokens) if tokens else np.ones(sum(counts), dtype=np.int64),
        reward_R=np.concatenate([np.array(r, dtype=np.float64) for r in rewards]),
        logp_ref_R=None if logps is None else np.concatenate([np.array(logp, dtype=np.float64) for logp in logps]),
        logq_R=None if logqs is None else np.concatenate([np.array(logq, dtype=np.float64) for logq in logqs]),
    )


def var(lambda_: float = 1.0, **changes: Any) -> Var:
    settings: dict[str, Any] = {
        "regime": ResponseRegime.support,
        "normaliser": Normaliser.per_prompt,
        "reference_factor": ReferenceFactor.sum,
    }
    return Var(lambda_=lambda_, **{**settings, **changes})


def sampled(lambda_: float = 1.0, **changes: Any) -> Var:
    return var(
        lambda_, **{"regime": ResponseRegime.from_reference, "reference_factor": ReferenceFactor.none, **changes}
    )


def behaved(lambda_: float = 1.0, **changes: Any) -> Var:
    return var(lambda_, **{"regime": ResponseRegime.from_behaviour, **changes})


LOG2, LOG3 = math.log(2), math.log(3)


def test_support_by_hand() -> None:
    # pi_ref = 1/2, 1/4 and exp(r / 2) = 1, 4: products 1/2 and 1, so w = 2 (1/3, 2/3)
    weights = var(2.0).weigh(columns([[0.0, 2 * math.log(4)]], [[-LOG2, -2 * LOG2]]))
    assert weights == pytest.approx([2 / 3, 4 / 3], abs=1e-15)


def test_reference_factors_by_hand() -> None:
    data = columns([[0.0, LOG3]], [[-2 * LOG2, -4 * LOG2]], [[1, 4]])
    # sum: 1/4 and 3/16; mean: l / T = -2 log 2 and -log 2, so 1/4 and 3/2; none: 1 and 3
    assert var().weigh(data) == pytest.approx([2 * 4 / 7, 2 * 3 / 7], abs=1e-14)
    assert var(reference_factor=ReferenceFactor.mean).weigh(data) == pytest.approx([2 / 7, 12 / 7], abs=1e-14)
    assert var(reference_factor=ReferenceFactor.none).weigh(data) == pytest.approx([0.5, 1.5], abs=1e-14)


def test_from_reference_holds_no_reference_factor() -> None:
    data = columns([[0.0, LOG3]], [[-1.0, -40.0]])
    assert sampled().weigh(data) == pytest.approx([0.5, 1.5], abs=1e-14)
    assert sampled(reference_factor=ReferenceFactor.sum).weigh(data) == pytest.approx([0.5, 1.5], abs=1e-14)


def test_from_behaviour_by_hand() -> None:
    # pi_ref = 1/2 and 1/4, q = 1/4 and 1/4, exp(r) = 1 and 3: 2 and 3
    data = columns([[0.0, LOG3]], [[-LOG2, -2 * LOG2]], logqs=[[-2 * LOG2, -2 * LOG2]])
    assert behaved().weigh(data) == pytest.approx([2 * 2 / 5, 2 * 3 / 5], abs=1e-14)


def test_samples_of_the_reference_itself_weigh_as_from_reference() -> None:
    rng = np.random.default_rng(7)
    rewards, logps = rng.normal(size=(5, 4)).tolist(), (-rng.integers(1, 90, size=(5, 4)) / 4).tolist()
    data = columns(rewards, logps, logqs=logps)
    for normaliser in (Normaliser.per_prompt, Normaliser.in_batch):
        assert np.array_equal(
            behaved(0.3, normaliser=normaliser).weigh(data), sampled(0.3, normaliser=normaliser).weigh(data)
        )


def test_from_behaviour_invariances_and_limits() -> None:
    base, logps, logqs = [[0.25, -1.5, 3.0]], [[-1.0, -2.0, -4.0]], [[-2.0, -1.5, -1.0]]
    before = behaved(0.5).weigh(columns(base, logps, logqs=logqs))
    shift = columns(
        [[r + 1024.0 for r in base[0]]], [[p - 32.0 for p in logps[0]]], logqs=[[q - 8.0 for q in logqs[0]]]
    )
    assert np.array_equal(before, behaved(0.5).weigh(shift))  # dyadic constants: of the reward, of pi_ref and of q
    ratio = np.exp(np.array(logps[0]) - np.array(logqs[0]))
    large = behaved(1e300).weigh(columns(base, logps, logqs=logqs))
    assert large == pytest.approx(3 * ratio / ratio.sum(), abs=1e-12)  # pi_ref, not SFT
    tied = columns([[5.0, -3.0, 5.0]], logps, logqs=logqs)
    assert behaved(1e-300).weigh(tied) == pytest.approx(
        [3 * ratio[0] / (ratio[0] + ratio[2]), 0, 3 * ratio[2] / (ratio[0] + ratio[2])], abs=1e-12
    )
    extreme = behaved(1e-3).weigh(columns([[1e4, -1e4, 0.0]], [[-900.0, -1.0, -5.0]], logqs=[[-1.0, -700.0, -3.0]]))
    assert np.isfinite(extreme).all() and extreme.sum() == pytest.approx(3, abs=1e-12)


def test_normalisers_by_hand() -> None:
    data = columns([[0.0, LOG3], [LOG2, LOG2]])
    # per prompt: 2 (1/4, 3/4) and 2 (1/2, 1/2); in batch: 4 (1, 3, 2, 2) / 8
    assert sampled().weigh(data) == pytest.approx([0.5, 1.5, 1.0, 1.0], abs=1e-14)
    assert sampled(normaliser=Normaliser.in_batch).weigh(data) == pytest.approx([0.5, 1.5, 1.0, 1.0], abs=1e-14)
    other = columns([[0.0, LOG3], [0.0, 0.0]])
    assert sampled(normaliser=Normaliser.in_batch).weigh(other) == pytest.approx([4 / 6, 2.0, 4 / 6, 4 / 6], abs=1e-14)


def test_groups_of_different_sizes_sum_to_their_size() -> None:
    rng = np.random.default_rng(0)
    rewards = [rng.normal(size=k).tolist() for k in (2, 5, 3)]
    logps = [(-50 * rng.random(size=k)).tolist() for k in (2, 5, 3)]
    data = columns(rewards, logps)
    assert np.bincount(data.group_R, weights=var().weigh(data)) == pytest.approx([2, 5, 3], abs=1e-12)
    assert var(normaliser=Normaliser.in_batch).weigh(data).sum() == pytest.approx(10, abs=1e-12)


def test_a_constant_per_prompt_changes_nothing() -> None:
    base = [[0.25, -1.5, 3.0], [2.0, 0.5]]
    logps = [[-1.0, -2.0, -1.5], [-3.0, -4.0]]
    shifted = [[r + 1024.0 for r in base[0]], [r - 4096.0 for r in base[1]]]
    for lambda_ in (0.01, 1.0, 100.0):
        before, after = var(lambda_).weigh(columns(base, logps)), var(lambda_).weigh(columns(shifted, logps))
        assert np.array_equal(before, after)  # dyadic rewards and constants: sums are exact, so nothing may differ


def test_a_constant_changes_at_most_its_rounding() -> None:
    """r + c rounds by at most eps |r + c| / 2. Each score then moves by at most twice that over lambda, and a softmax share
    moves by at most p (1 - p) times the largest difference of score errors, so by 1/4 of it."""
    rng = np.random.default_rng(1)
    c, lambda_ = 1e4, 0.01
    rewards = rng.normal(size=(50, 4))
    before = sampled(lambda_).weigh(columns(rewards.tolist()))
    after = sampled(lambda_).weigh(columns((rewards + c).tolist()))
    rounding = np.finfo(np.float64).eps / 2 * np.abs(rewards + c).max()
    bound = 4 * (4 * rounding / lambda_) / 4  # K times the share's bound; scores differ by two roundings each
    assert 0 < np.abs(before - after).max() <= bound < 1e-8


def test_in_batch_is_invariant_to_a_global_constant_only() -> None:
    objective = sampled(0.5, normaliser=Normaliser.in_batch)
    base = [[0.25, -1.5], [2.0, 0.5]]
    before = objective.weigh(columns(base))
    assert np.array_equal(before, objective.weigh(columns([[r + 64.0 for r in group] for group in base])))
    assert not np.allclose(before, objective.weigh(columns([[0.25 + 1, -1.5 + 1], base[1]])))


def test_limit_of_large_lambda() -> None:
    """What is left is the reference factor, 3 softmax(f), and not SFT, unless f is none or the responses are samples."""
    # exp(l) = 1/2, 1/4 and 1/16; with 1, 1 and 2 tokens exp(l / T) = 1/2, 1/4 and 1/4
    data = columns([[5.0, -3.0, 0.0]], [[-LOG2, -2 * LOG2, -4 * LOG2]], [[1, 1, 2]])
    assert sampled(1e300).weigh(data) == pytest.approx([1, 1, 1], abs=1e-12)
    for factor, shares in (("sum", [8 / 13, 4 / 13, 1 / 13]), ("mean", [1 / 2, 1 / 4, 1 / 4]), ("none", [1 / 3] * 3)):
        weights = var(1e300, reference_factor=ReferenceFactor(factor)).weigh(data)
        assert weights == pytest.approx([3 * share for share in shares], abs=1e-12), factor


def test_limit_of_small_lambda() -> None:
    """The best rewards tie and share by the reference factor; the likeliest response has none of the weight."""
    # of the two, exp(l) = 1/9 and 1/27; with 2 and 1 tokens exp(l / T) = 1/3 and 1/27
    data = columns([[5.0, -3.0, 5.0]], [[-2 * LOG3, -0.1, -3 * LOG3]], [[2, 1, 1]])
    assert sampled(1e-300).weigh(data) == pytest.approx([1.5, 0, 1.5], abs=1e-12)
    for factor, shares in (("sum", [3 / 4, 0, 1 / 4]), ("mean", [9 / 10, 0, 1 / 10]), ("none", [1 / 2, 0, 1 / 2])):
        weights = var(1e-300, reference_factor=ReferenceFactor(factor)).weigh(data)
        assert weights == pytest.approx([3 * share for share in shares], abs=1e-12), factor


@pytest.mark.parametrize("normaliser", [Normaliser.per_prompt, Normaliser.in_batch])
def test_extreme_rewards_give_finite_weights_that_sum_to_n(normaliser: Normaliser) -> None:
    data = columns([[1e4, -1e4, 0.0], [-1e4, -1e4], [1e4, 1e4]], [[-900.0, -1.0, -5.0], [-1.0, -800.0], [-3.0, -3.0]])
    for objective in (var(1e-3, normaliser=normaliser), sampled(1e-3, normaliser=normaliser)):
        weights = objective.weigh(data)
        assert np.isfinite(weights).all() and (weights >= 0).all()
        assert weights.sum() == pytest.approx(7, abs=1e-12)


@pytest.mark.parametrize("lambda_", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_lambda_is_refused_by_name(lambda_: float) -> None:
    with pytest.raises(ValueError, match=r"lambda: got .*, expected a finite number above 0"):
        var(lambda_)
    with pytest.raises(ValueError, match="lambda"):
        VarConfig(lambda_=lambda_, reference_factor=ReferenceFactor.sum)


def test_refusals_name_rows_and_remedies() -> None:
    with pytest.raises(ValueError, match=r"reward: 1 of 4 values are NaN or infinite, in 1 rows \(first: row1\)"):
        sampled().weigh(columns([[0.0, 1.0], [0.0, math.nan]]))
    with pytest.raises(ValueError, match=r"logp_ref: 1 of 2 values"):
        var().weigh(columns([[0.0, 1.0]], [[-1.0, -math.inf]]))
    with pytest.raises(ValueError, match="logp_ref: no such column"):
        var().weigh(columns([[0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"1 of 2 rows have a single response \(first: row1\)"):
        sampled().weigh(columns([[0.0, 1.0], [0.0]]))
    with pytest.raises(ValueError, match=r"logq: no such column"):
        behaved().weigh(columns([[0.0, 1.0]], [[-1.0, -1.0]]))
    with pytest.raises(ValueError, match=r"logq: 1 of 4 values are NaN or infinite, in 1 rows \(first: row1\)"):
        behaved().weigh(columns([[0.0, 1.0]] * 2, [[-1.0, -1.0]] * 2, logqs=[[-1.0, -1.0], [-1.0, math.nan]]))
    with pytest.raises(ValueError, match="logp_ref: no such column"):
        behaved().weigh(columns([[0.0, 1.0]], logqs=[[-1.0, -1.0]]))
    for factor in (ReferenceFactor.mean, ReferenceFactor.none):
        with pytest.raises(ValueError, match=f"reference_factor {factor}: not defined for responses from_behaviour"):
            behaved(reference_factor=factor)
    with pytest.raises(ValueError, match=r"reference_factor mean.*from_reference"):
        sampled(reference_factor=ReferenceFactor.mean)
    with pytest.raises(ValueError, match=r"step 2 \(rows a\): all are zero; expected a sum of N"):
        check_weights(np.zeros(3), step=2, row_ids=["a"])
    with pytest.raises(ValueError, match=r"step 0 \(rows a, b, c, \.\.\.\): got NaN"):
        check_weights(np.array([1.0, math.nan]), step=0, row_ids=list("abcd"))


def test_in_batch_takes_a_group_of_one() -> None:
    weights = sampled(normaliser=Normaliser.in_batch).weigh(columns([[0.0, LOG3], [LOG2]]))
    assert weights == pytest.approx([0.5, 1.5, 1.0], abs=1e-14)


def resolve(data: Columns, *, regime: ResponseRegime = ResponseRegime.from_reference, **config: Any) -> float:
    """Return lambda in reward units as training resolves it."""
    given = VarConfig.model_validate({"reference_factor": "none"} | config)
    return given.make(data, regime=regime, cross={}).lambda_


def test_lambda_in_reward_standard_deviations() -> None:
    data = columns([[1.0, 3.0], [10.0, 10.0, 13.0]])
    # squares about the means 2 and 11: 1 + 1 + 1 + 1 + 4 = 8, degrees of freedom 1 + 2
    assert within_group_variance(data.reward_R, data.group_R) == pytest.approx(8 / 3)
    assert resolve(data, lambda_=0.5) == pytest.approx(0.5 * math.sqrt(8 / 3))
    for unit in ("reward_std", "ess_target"):
        with pytest.raises(ValueError, match=f"{unit}: within every prompt all rewards are equal"):
            resolve(columns([[1.0, 1.0], [2.0, 2.0]]), lambda_=0.5, lambda_unit=unit)
        with pytest.raises(ValueError, match=f"{unit}: within every prompt all rewards are equal"):
            resolve(
                columns([[0.1] * 3, [0.7] * 5]), lambda_=0.5, lambda_unit=unit
            )  # their means round to another number


def test_rewards_in_other_units_give_the_same_weights() -> None:
    rewards = np.random.default_rng(0).normal(size=(6, 3))
    plain, scaled = columns(rewards.tolist()), columns((rewards * 250).tolist())
    for unit in ("reward_std", "ess_target"):
        first = sampled(resolve(plain, lambda_=0.7, lambda_unit=unit)).weigh(plain)
        second = sampled(resolve(scaled, lambda_=0.7, lambda_unit=unit)).weigh(scaled)
        assert second == pytest.approx(first, abs=1e-9)


def test_lambda_of_an_effective_sample_size_by_hand() -> None:
    # shares 1/4 and 3/4 at lambda 1: 1 / (1/16 + 9/16) = 1.6 responses, 0.8 of 2
    data = columns([[0.0, LOG3]])
    assert resolve(data, lambda_=0.8, lambda_unit="ess_target") == pytest.approx(1.0, rel=1e-9)
    assert describe_weights(data, sampled(1.0).weigh(data))["ess"] == pytest.approx(0.8)
    # of two prompts the mean counts: one that ties everywhere has 1 whatever lambda is
    tied = columns([[0.0, LOG3], [7.0, 7.0]])
    assert resolve(tied, lambda_=0.9, lambda_unit="ess_target") == pytest.approx(1.0, rel=1e-9)


def test_the_effective_sample_size_of_samples_grows_with_lambda_and_every_target_is_hit() -> None:
    data = columns(np.random.default_rng(3).normal(size=(40, 5)).tolist())
    sizes = [describe_weights(data, sampled(lambda_).weigh(data))["ess"] for lambda_ in np.logspace(-3, 3, 61)]
    assert (np.diff(sizes) > 0).all()
    for target in (0.21, 0.4, 0.75, 0.99, 1.0):
        found = sampled(resolve(data, lambda_=target, lambda_unit="ess_target"))
        assert describe_weights(data, found.weigh(data))["ess"] == pytest.approx(target, abs=2e-6)


def test_of_several_lambdas_with_one_effective_sample_size_the_smallest_is_taken() -> None:
    """The reference prefers the first, the reward the last: 1 of 4 at both ends, 4 of 4 at lambda 1, where they cancel."""
    data = columns([[0.0, 10.0, 20.0, 30.0]], [[0.0, -10.0, -20.0, -30.0]])
    assert var(1.0).weigh(data) == pytest.approx([1, 1, 1, 1], abs=1e-12)
    for end in (1e-3, 1e3):
        assert describe_weights(data, var(end).weigh(data))["ess"] == pytest.approx(0.25, abs=1e-4)
    config = {"lambda_unit": "ess_target", "reference_factor": "sum"}
    found = resolve(data, regime=ResponseRegime.support, lambda_=0.5, **config)
    assert 0.25 < found < 1.0
    assert describe_weights(data, var(found).weigh(data))["ess"] == pytest.approx(0.5, abs=1e-6)
    mirrored = 1 / (2 - 1 / found)  # s = r (1/lambda - 1): its negative has the same effective size
    assert describe_weights(data, var(mirrored).weigh(data))["ess"] == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("normaliser", [Normaliser.per_prompt, Normaliser.in_batch])
@pytest.mark.parametrize(
    ("regime", "rewards"),
    [
        (ResponseRegime.support, [0.0, math.log(6)]),  # l: the first is twice as likely
        (ResponseRegime.from_reference, [0.0, LOG3]),
        (ResponseRegime.from_behaviour, [0.0, math.log(12)]),  # l - log q: four times, as q prefers the second
    ],
)
def test_an_effective_sample_size_is_of_prompts_whatever_the_regime_and_normaliser(
    regime: ResponseRegime, rewards: list[float], normaliser: Normaliser
) -> None:
    """Shares of 1/4 and 3/4 at lambda 1 in either prompt: 0.8 of 2. One has e^20 times the weight under in_batch, where the batch has 0.4."""
    logps, logqs = [[-LOG2, -2 * LOG2]] * 2, [[-2 * LOG2, -LOG2]] * 2
    data = columns([rewards, [20 + r for r in rewards]], logps, logqs=logqs)
    config = {"lambda_unit": "ess_target", "reference_factor": "sum", "normaliser": normaliser}
    found = resolve(data, regime=regime, lambda_=0.8, **config)
    assert found == pytest.approx(1.0, rel=1e-9)
    figures = describe_weights(data, var(found, regime=regime, normaliser=normaliser).weigh(data))
    assert figures["ess"] == pytest.approx(0.8, abs=1e-8)
    assert figures["ess_batch"] == pytest.approx(0.8 if normaliser == Normaliser.per_prompt else 0.4, abs=1e-7)


@pytest.mark.parametrize("normaliser", [Normaliser.per_prompt, Normaliser.in_batch])
def test_the_effective_sample_size_of_another_policys_samples_is_hit_at_the_smallest_lambda(
    normaliser: Normaliser,
) -> None:
    """Samples of the reference itself have the lambda of from_reference."""
    rng = np.random.default_rng(4)
    rewards = (rng.normal(size=(30, 5)) + rng.normal(size=(30, 1))).tolist()  # some prompts have larger ones
    logps, logqs = (rng.normal(-4.0, 1.0, size=(30, 5)).tolist() for _ in range(2))
    data, same = columns(rewards, logps, logqs=logqs), columns(rewards, logps, logqs=logps)
    config = {"lambda_unit": "ess_target", "reference_factor": "sum", "normaliser": normaliser}
    for target in (0.25, 0.4, 0.5):
        found = resolve(data, regime=ResponseRegime.from_behaviour, lambda_=target, **config)
        own = {"normaliser": normaliser}
        assert describe_weights(data, behaved(found, **own).weigh(data))["ess"] == pytest.approx(target, abs=2e-6)
        smaller = [behaved(found * share, **own).weigh(data) for share in np.linspace(0.2, 0.99, 50)]
        assert max(describe_weights(data, weights)["ess"] for weights in smaller) < target
        of_samples = resolve(same, regime=ResponseRegime.from_reference, lambda_=target, **config)
        assert resolve(same, regime=ResponseRegime.from_behaviour, lambda_=target, **config) == of_samples


def test_an_effective_sample_size_that_is_reached_where_two_responses_tie_alone_is_found() -> None:
    """Against 2,200 nats the reward wins or loses all within a thousandth of lambda, between two of those that are scanned."""
    data = columns([[0.0, 1.0]], [[0.0, -2200.0]])
    config = {"lambda_unit": "ess_target", "reference_factor": "sum"}
    found = resolve(data, regime=ResponseRegime.support, lambda_=0.8, **config)
    assert found == pytest.approx(1 / 2200, rel=1e-2)
    assert describe_weights(data, var(found).weigh(data))["ess"] == pytest.approx(0.8, abs=1e-6)


def test_an_effective_sample_size_that_two_prompts_have_together_between_their_ties_is_found() -> None:
    data = columns([[0.0, 3000.0], [0.0, 3001.2]], [[0.0, -3000.0], [0.0, -3000.0]])
    config = {"lambda_unit": "ess_target", "reference_factor": "sum"}
    found = resolve(data, regime=ResponseRegime.support, lambda_=0.9198, **config)
    assert found == pytest.approx(1.0002, abs=1e-4)
    assert describe_weights(data, var(found).weigh(data))["ess"] == pytest.approx(0.9198, abs=1e-6)
    with pytest.raises(ValueError, match=r"got 0\.93, expected a share of K between 0\.5 and 0\.92"):
        resolve(data, regime=ResponseRegime.support, lambda_=0.93, **config)


@pytest.mark.parametrize("unit", ["reward_std", "ess_target"])
def test_rewards_too_large_to_be_counted_in_are_named(unit: str) -> None:
    with pytest.raises(ValueError, match=r"rewards of up to 1e\+200 have no variance"):
        resolve(columns([[1e200, -1e200]]), lambda_=0.8, lambda_unit=unit)


def test_an_effective_sample_size_out_of_reach_is_refused_with_the_range() -> None:
    with pytest.raises(ValueError, match=r"ess_target: got 0\.5, expected a share of K between 0\.6667 and 1"):
        resolve(columns([[1.0, 1.0, 0.0]]), lambda_=0.5, lambda_unit="ess_target")  # the two best tie
    agreeing = columns([[1.0, 0.0]], [[0.0, -40.0]])
    config = {"lambda_unit": "ess_target", "reference_factor": "sum"}
    with pytest.raises(ValueError, match=r"ess_target: got 0\.9, expected a share of K between 0\.5 and 0\.5"):
        resolve(agreeing, regime=ResponseRegime.support, lambda_=0.9, **config)
    with pytest.raises(ValueError, match=r"got 1\.5 as ess_target, expected a share of K above 0 and up to 1"):
        VarConfig(lambda_=1.5, lambda_unit="ess_target", reference_factor="none")


def transformed(
    data: Columns, kind: str, *, regime: ResponseRegime = ResponseRegime.from_reference, **config: Any
) -> list[float]:
    given = VarConfig.model_validate(
        {"reference_factor": "none", "lambda_unit": "reward", "reward_transform": kind} | config
    )
    weighed = given.make(data, regime=regime, cross={}).transform(data)
    assert weighed.reward_R is not None
    return list(weighed.reward_R)


def test_reward_transforms_by_hand() -> None:
    data = columns([[0.0, 4.0, 2.0, 2.0], [10.0, -10.0]])
    assert transformed(data, "none") == [0, 4, 2, 2, 10, -10]
    assert transformed(data, "centred") == [-2, 2, 0, 0, 10, -10]
    assert transformed(data, "clipped", clip_low=-1.5, clip_high=3.0) == [0, 3, 2, 2, 3, -1.5]
    # of four: 1/8, then 7/8, and the tie of ranks 2 and 3 at their middle; of two: 3/4 and 1/4
    assert transformed(data, "quantile") == pytest.approx([1 / 8, 7 / 8, 1 / 2, 1 / 2, 3 / 4, 1 / 4], abs=1e-15)


def test_quantiles_of_a_fixed_set_are_those_under_the_reference() -> None:
    data = columns([[3.0, 1.0, 2.0]], [[math.log(0.2), math.log(0.5), math.log(0.3)]])
    config = {"regime": ResponseRegime.support, "reference_factor": "sum"}
    # below 1: nothing; below 2: 0.5; below 3: 0.8; and half of one's own probability
    assert transformed(data, "quantile", **config) == pytest.approx([0.9, 0.25, 0.65], abs=1e-15)


def test_quantiles_depend_on_the_order_of_a_prompts_rewards_alone() -> None:
    rng = np.random.default_rng(5)
    rewards = [rng.normal(size=k) for k in (2, 7, 3)]
    before = transformed(columns([r.tolist() for r in rewards]), "quantile")
    bent = [np.exp(3 * r) + shift for r, shift in zip(rewards, (0.0, 50.0, -9.0), strict=True)]
    assert transformed(columns([r.tolist() for r in bent]), "quantile") == before


def test_quantiles_are_rounded_by_no_other_prompt() -> None:
    rewards = np.random.default_rng(0).normal(size=(20_000, 3)).tolist()
    quantiles = np.array(transformed(columns(rewards), "quantile")).reshape(-1, 3)
    assert np.abs(np.sort(quantiles) - np.array([1 / 6, 1 / 2, 5 / 6])).max() < 1e-15


def test_quantile_rewards_have_the_closed_form_z() -> None:
    """Z = E[exp(q / lambda)] = lambda (exp(1 / lambda) - 1); mid-ranks are the midpoint rule of that integral, whose error is at
    most exp(1 / lambda) / (24 K^2 lambda^2). With ties the rule is coarser, and the formula off by more."""
    rng, K, lambda_ = np.random.default_rng(6), 500, 0.4
    closed = lambda_ * (math.exp(1 / lambda_) - 1)
    quantile = np.array(transformed(columns([rng.normal(size=K).tolist()]), "quantile"))
    assert abs(np.exp(quantile / lambda_).mean() - closed) <= math.exp(1 / lambda_) / (24 * K**2 * lambda_**2)
    tied = np.array(transformed(columns([rng.integers(0, 2, size=K).astype(float).tolist()]), "quantile"))
    assert abs(np.exp(tied / lambda_).mean() - closed) > 0.05


def test_centred_rewards_make_in_batch_blind_to_a_constant_per_prompt() -> None:
    """Over a prompt's own responses the softmax already is: there centring changes nothing."""
    base = [[0.25, -1.5], [2.0, 0.5]]
    shifted = [[r + 32.0 for r in base[0]], [r - 8.0 for r in base[1]]]
    objective = sampled(0.5, normaliser=Normaliser.in_batch)
    weights = [
        objective.weigh(columns(np.reshape(transformed(columns(r), "centred"), (2, 2)).tolist()))
        for r in (base, shifted)
    ]
    assert np.array_equal(weights[0], weights[1])
    centred = columns(np.reshape(transformed(columns(base), "centred"), (2, 2)).tolist())
    assert sampled(0.5).weigh(centred) == pytest.approx(sampled(0.5).weigh(columns(base)), abs=1e-14)


def test_lambda_counts_in_the_transformed_reward() -> None:
    data = columns([[0.0, 100.0], [0.0, 3.0]])
    # quantiles 1/4 and 3/4: a variance of 1/8 within each prompt
    config = {"lambda_": 2.0, "lambda_unit": "reward_std", "reward_transform": "quantile"}
    assert resolve(data, **config) == pytest.approx(2 * math.sqrt(1 / 8))


def test_transforms_say_what_they_did_and_are_refused_half_given() -> None:
    data = columns([[0.0, 4.0, 2.0], [5.0, 5.0, -9.0]])
    clip = VarConfig(reference_factor="none", reward_transform="clipped", clip_low=-1.0, clip_high=4.0)
    weighed = clip.make(data, regime=ResponseRegime.from_reference, cross={}).transform(data)
    assert describe_transform(data, weighed, RewardTransform.clipped) == {
        "reward_transform": "clipped",
        "clipped_rewards": 3,
    }
    rank = VarConfig(reference_factor="none", reward_transform="quantile")
    weighed = rank.make(data, regime=ResponseRegime.from_reference, cross={}).transform(data)
    said = describe_transform(data, weighed, RewardTransform.quantile)
    assert said["tied_prompts"] == 1 and "does not hold" in said["note"]
    untied = columns([[0.0, 4.0, 2.0]])
    said = describe_transform(untied, untied, RewardTransform.quantile)
    assert said == {"reward_transform": "quantile", "tied_prompts": 0}
    for kind, low, high, words in (
        ("clipped", None, 1.0, "clip_low below clip_high; set both"),
        ("clipped", 1.0, 1.0, "clip_low below clip_high"),
        ("none", 0.0, 1.0, "which clips nothing"),
    ):
        with pytest.raises(ValueError, match=words):
            VarConfig(reference_factor="none", reward_transform=kind, clip_low=low, clip_high=high)
    with pytest.raises(ValueError, match=r"reward: 1 of 2 values are NaN"):
        transformed(columns([[math.nan, 1.0]]), "quantile")


def test_figures_by_hand() -> None:
    data = columns([[0.0, 1.0], [2.0, 0.0]])
    figures = describe_weights(data, np.array([0.5, 1.5, 1.0, 1.0]))
    # effective sizes 4 / 2.5 = 1.6 and 2, as shares of 2: 0.8 and 1
    assert figures["ess"] == pytest.approx(0.9)
    assert figures["ess_collapsed"] == 0.0
    assert figures["ess_batch"] == pytest.approx(16 / (4 * 4.5))  # weights of 0.5, 1.5, 1, 1
    assert figures["weight_max"] == pytest.approx(0.75)
    assert figures["kl_weights"] == pytest.approx((0.25 * math.log(0.5) + 0.75 * math.log(1.5)) / 2)
    assert figures["reward_tilt"] == pytest.approx((1.5 + 2.0) / 4 - 3 / 4)
    assert figures["argmax_agreement"] == 1.0
    assert describe_weights(data, np.array([1.5, 0.5, 1.0, 1.0]))["argmax_agreement"] == 0.5


def test_collapsed_prompts_are_those_where_one_response_has_nearly_all_weight() -> None:
    data = columns([[0.0, 1.0], [2.0, 0.0], [0.0, 0.0]])
    # shares 0.95 and 0.96: 1 / (0.95^2 + 0.05^2) = 1.105 responses, 1 / (0.96^2 + 0.04^2) = 1.083
    assert describe_weights(data, np.array([1.9, 0.1, 1.92, 0.08, 1.0, 1.0]))["ess_collapsed"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("rewards", [[[0.0, 1.0], [-10.0, -9.0]], [[0.0, 1.0], [-9.0, -10.0]]])
def test_prompts_without_weight_neither_agree_nor_disagree_with_the_reward(rewards: list[list[float]]) -> None:
    """By in_batch e^-1000 of the weight is left for the second, whose heaviest response would be the first of equals."""
    data = columns(rewards)
    objective = sampled(0.01, normaliser=Normaliser.in_batch)
    told = objective.summary(data, data, objective.weigh(data))
    assert told["argmax_agreement"] == 1.0 and "warning" not in told


@pytest.mark.parametrize("lambda_", [1e-300, 1e-160, 1e160, 1e300])
def test_a_run_of_any_lambda_has_a_summary(lambda_: float) -> None:
    data = columns([[0.0, 1.0], [2.0, 0.0]])
    told = sampled(lambda_).summary(data, data, sampled(lambda_).weigh(data))
    json.dumps(told, allow_nan=False)
    if lambda_ < 1:  # a number beyond all that JSON has
        assert "variance_reward_over_lambda" not in told
    else:
        assert 0 <= told["variance_reward_over_lambda"] < 1e-300


def test_a_prompt_that_has_all_the_weight_of_a_batch_is_seen_in_the_batchs_sample_size() -> None:
    """By in_batch, of four prompts whose two responses tie: e^-100 of the weight is left for three of them."""
    data = columns([[100.0, 100.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    figures = describe_weights(data, sampled(1.0, normaliser=Normaliser.in_batch).weigh(data))
    assert (figures["ess"], figures["weight_max"]) == (1.0, 0.5)
    assert figures["ess_batch"] == pytest.approx(0.25)


def test_figures_of_a_prompt_without_weight() -> None:
    figures = describe_weights(columns([[0.0, 1.0], [2.0, 0.0]]), np.array([0.0, 0.0, 2.0, 2.0]))
    assert (figures["ess"], figures["argmax_agreement"]) == (1.0, 1.0)


def test_sft_is_var_with_unit_weights() -> None:
    data = columns([[0.0, 1.0], [2.0, 0.0]])
    weights = Sft().weigh(data)
    assert weights.tolist() == [1, 1, 1, 1] == sampled(1e300).weigh(data).tolist()
    value, weight = torch.tensor([-1.0, -2.0, -4.0, -8.0]), torch.tensor(weights)
    assert Sft().loss_sum(value, weight, data).item() == 15 == sampled().loss_sum(value, weight, data).item()
    assert Sft().denominator(data, mean_tokens=3.0) == 12 == sampled().denominator(data, mean_tokens=3.0)


def test_bradley_terry_by_hand() -> None:
    data = columns([[0.0, 0.0], [0.0, 0.0, 0.0]])
    value = torch.tensor([LOG3, 0.0, 0.0, LOG3, 0.0], dtype=torch.float64)
    weight = torch.tensor(BradleyTerry().weigh(data))
    # sigmoid(log 3) = 3/4; the second prompt: sigmoid(-log 3) = 1/4 and sigmoid(0) = 1/2, each half
    expected = -math.log(3 / 4) - (math.log(1 / 4) + math.log(1 / 2)) / 2
    assert BradleyTerry().loss_sum(value, weight, data).item() == pytest.approx(expected, abs=1e-12)
    assert BradleyTerry().denominator(data, mean_tokens=9.0) == 2
    alone = BradleyTerry().loss_sum(value[2:], weight[2:], data.take([2, 3, 4])).item()
    assert alone == pytest.approx(expected + math.log(3 / 4), abs=1e-12)
    with pytest.raises(ValueError, match="row1: a single response"):
        BradleyTerry().weigh(columns([[0.0, 0.0], [0.0]]))


def dpo_loss(objective: Dpo, data: Columns, values: list[float]) -> float:
    value, weight = torch.tensor(values, dtype=torch.float64), torch.tensor(objective.weigh(data))
    return objective.loss_sum(value, weight, data).item() / objective.denominator(data, mean_tokens=9.0)


def test_dpo_by_hand() -> None:
    # beta 0.5; implicit rewards are half the log-ratios: chosen 0 and rejected -log 3, so sigmoid(log 3) = 3/4
    pair = columns([[0.0, 0.0]], [[-2.0, -5.0]])
    values = [-2.0, -5.0 - 2 * LOG3]
    assert dpo_loss(Dpo(beta=0.5), pair, values) == pytest.approx(-math.log(3 / 4), abs=1e-14)
    smooth = -0.9 * math.log(3 / 4) - 0.1 * math.log(1 / 4)
    assert dpo_loss(Dpo(beta=0.5, label_smoothing=0.1), pair, values) == pytest.approx(smooth, abs=1e-14)
    # the policy that is the reference: log 2, whatever the responses are
    assert dpo_loss(Dpo(beta=0.1), pair, [-2.0, -5.0]) == pytest.approx(LOG2, abs=1e-15)


def test_dpo_of_more_rejected_is_the_mean_over_them_within_a_prompt() -> None:
    data = columns([[0.0, 0.0], [0.0, 0.0, 0.0]], [[0.0, 0.0], [-1.0, -1.0, -1.0]])
    values = [LOG3, 0.0, -1.0, LOG3 - 1, -1.0]
    # sigmoid(log 3) = 3/4; then sigmoid(-log 3) = 1/4 and sigmoid(0) = 1/2, each half; the mean over both prompts
    expected = (-math.log(3 / 4) - (math.log(1 / 4) + math.log(1 / 2)) / 2) / 2
    assert dpo_loss(Dpo(beta=1.0), data, values) == pytest.approx(expected, abs=1e-14)
    figures = Dpo(beta=1.0).figures(np.array(values), data)
    assert figures["rewards/chosen"] == pytest.approx(LOG3 + 0.0)
    assert figures["rewards/rejected"] == pytest.approx(0.0 + LOG3 / 2)
    assert figures["rewards/margins"] == pytest.approx(LOG3 - LOG3 / 2)
    assert figures["rewards/accuracies"] == pytest.approx(1 + (0 + 0.5) / 2)


def test_dpo_sees_differences_from_the_reference_alone() -> None:
    """A constant on both log-probabilities of a response, and one on all of a prompt's, changes nothing (dyadic: exactly)."""
    values, logps = [-2.0, -7.5, -3.25], [-1.0, -6.0, -4.5]
    before = dpo_loss(Dpo(beta=0.5), columns([[0.0] * 3], [logps]), values)
    moved = [v + c for v, c in zip(values, (64.0, -16.0, 8.0), strict=True)]
    moved_logps = [logp + c for logp, c in zip(logps, (64.0, -16.0, 8.0), strict=True)]
    assert dpo_loss(Dpo(beta=0.5), columns([[0.0] * 3], [moved_logps]), moved) == before
    assert dpo_loss(Dpo(beta=0.5), columns([[0.0] * 3], [logps]), [v - 1024.0 for v in values]) == before


def test_dpo_stays_finite_and_pulls_apart_only_where_it_is_wrong() -> None:
    data = columns([[0.0, 0.0]], [[0.0, 0.0]])
    weight = torch.tensor(Dpo(beta=1.0).weigh(data))
    for margin, gradient in ((1e4, 0.0), (-1e4, -1.0), (0.0, -0.5)):
        value = torch.tensor([margin, 0.0], dtype=torch.float64, requires_grad=True)
        loss = Dpo(beta=1.0).loss_sum(value, weight, data)
        loss.backward()
        assert loss.isfinite() and value.grad is not None
        assert value.grad.tolist() == pytest.approx([gradient, -gradient], abs=1e-15)  # - beta sigmoid(-margin)


def test_dpo_refusals_name_rows() -> None:
    with pytest.raises(ValueError, match=r"logp_ref: no such column; the objective dpo needs one.*reference"):
        Dpo(beta=0.1).weigh(columns([[0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"logp_ref: 1 of 2 values are NaN or infinite, in 1 rows \(first: row0\)"):
        Dpo(beta=0.1).weigh(columns([[0.0, 1.0]], [[-1.0, math.nan]]))
    with pytest.raises(ValueError, match="row1: a single response"):
        Dpo(beta=0.1).weigh(columns([[0.0, 0.0], [0.0]], [[-1.0, -1.0], [-1.0]]))
    for field in ({"beta": 0.0}, {"beta": math.nan}, {"label_smoothing": 0.5}, {"label_smoothing": -0.1}):
        with pytest.raises(ValueError, match=next(iter(field))):
            DpoConfig.model_validate(field)


def test_columns_of_some_responses_keep_their_groups() -> None:
    data = columns([[1.0, 2.0], [3.0], [4.0, 5.0]], [[-1.0, -2.0], [-3.0], [-4.0, -5.0]])
    some = data.take([4, 0, 3])
    assert some.row_ids == ("row0", "row2") and some.group_R.tolist() == [1, 0, 1]
    assert some.reward_R is not None and some.logp_ref_R is not None
    assert (some.reward_R.tolist(), some.logp_ref_R.tolist()) == ([5, 1, 4], [-5, -1, -4])


@pytest.mark.parametrize("regime", [ResponseRegime.from_reference, ResponseRegime.from_behaviour])
def test_sampled_target_approaches_the_optimum_as_one_over_root_k(regime: ResponseRegime) -> None:
    """One prompt, K samples of pi_ref, or of another policy, with their weights: the mean distance to pi* falls with slope
    -1/2 in K."""
    rng = np.random.default_rng(0)
    num_outcomes, sizes, seeds = 12, [128, 256, 512, 1024, 2048], 80
    logp_ref = np.log(rng.dirichlet(np.ones(num_outcomes)))
    reward = rng.normal(size=num_outcomes)
    best = np.exp(logp_ref + reward / 0.8)
    best /= best.sum()
    is_behaved = regime == ResponseRegime.from_behaviour
    logq = np.log(rng.dirichlet(5 * np.ones(num_outcomes))) if is_behaved else logp_ref
    objective = (behaved if is_behaved else sampled)(0.8)
    errors = []
    for size in sizes:
        distances = []
        for _ in range(seeds):
            drawn = rng.choice(num_outcomes, size=size, p=np.exp(logq))
            picked = [column[drawn].tolist() for column in (reward, logp_ref, logq)]
            weights = objective.weigh(columns([picked[0]], [picked[1]], logqs=[picked[2]]))
            target = np.bincount(drawn, weights=weights, minlength=num_outcomes) / size
            distances.append(0.5 * np.abs(target - best).sum())
        errors.append(np.mean(distances))
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert abs(slope + 0.5) <= 0.08
