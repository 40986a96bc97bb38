"""Selectors against their promises, on losses whose mean is known."""

import numpy as np
import pytest

from cascade_det.calibration.risk_bounds import (
    binomial_p_value,
    binomial_ucb,
    hoeffding_bentkus_p_value,
    hoeffding_bentkus_ucb,
    wsr_ucb,
)
from cascade_det.calibration.risk_control import (
    SampleTooSmallError,
    check_sample_size,
    crc,
    fixed_sequence,
    pareto_front,
    pareto_testing,
    smallest_sample,
    ucb,
)

DELTA = 0.1


def with_total(total, count):
    """``count`` losses with that sum: ones, a remainder, zeros."""
    losses = np.zeros(count)
    losses[: int(total)] = 1
    losses[int(total)] = total - int(total)
    return losses


def test_smallest_samples():
    risks = (0.05, 0.02, 0.01, 0.005)
    assert [smallest_sample(risk, DELTA) for risk in risks] == [45, 114, 230, 460]
    assert [smallest_sample(risk) for risk in risks] == [19, 49, 99, 199]


def test_too_few_images_are_refused_in_advance():
    with pytest.raises(SampleTooSmallError, match=r"78 images .* 114 are needed"):
        check_sample_size(78, 0.02, 0.1)
    check_sample_size(114, 0.02, 0.1)
    for count, risk in ((113, 0.02), (44, 0.05)):
        with pytest.raises(SampleTooSmallError):
            fixed_sequence(np.zeros((3, count)), risk, DELTA)
        assert fixed_sequence(np.zeros((3, count + 1)), risk, DELTA) == 2
    with pytest.raises(SampleTooSmallError, match="49 are needed"):
        crc(np.zeros((3, 48)), 0.02)
    assert crc(np.zeros((3, 49)), 0.02) == 2
    with pytest.raises(SampleTooSmallError, match=r"the bound is 0\.0238"):
        ucb(np.zeros((3, 100)), 0.0237, DELTA)
    assert ucb(np.zeros((3, 100)), 0.0239, DELTA) == 2
    with pytest.raises(SampleTooSmallError, match=r"113 images .* Of 227 images half"):
        pareto_testing(np.zeros((3, 227)), [3, 2, 1], 0.02, DELTA)
    assert pareto_testing(np.zeros((3, 228)), [3, 2, 1], 0.02, DELTA).setting == 2


def ones(*totals, count=200):
    return np.stack([with_total(total, count) for total in totals])


def test_selectors_stop_at_the_first_failure():
    # 200 images, level 0.1: p-values of 0, 8, 30 ones are 7e-10, 0.005 and 1. What passes behind
    # the failure does not count.
    losses = ones(0, 8, 30, 0, 8)
    assert fixed_sequence(losses, 0.1, DELTA) == 1
    assert fixed_sequence(losses, 0.1, DELTA, binomial_p_value) == 1
    for bound in (hoeffding_bentkus_ucb, binomial_ucb, wsr_ucb):
        assert ucb(losses, 0.1, DELTA, bound) == 1
    assert crc(losses, 0.1) == 1


def test_the_full_cascade_where_nothing_passes():
    for losses in (ones(30, 0, 0), ones(0, 30), ones(0)):
        assert fixed_sequence(losses, 0.1, DELTA) == 0
        assert ucb(losses, 0.1, DELTA) == 0
        assert crc(losses, 0.1) == 0
    outcome = pareto_testing(ones(0, 90, 80), [3, 2, 1], 0.1, DELTA)
    assert outcome.setting == 0
    assert outcome.front.tolist() == [0, 2]
    # On the images that chose it, the second is as good as the full cascade.
    losses = np.zeros((2, 200))
    losses[1, outcome.testing_images] = 1
    outcome = pareto_testing(losses, [3, 2], 0.1, DELTA)
    assert outcome.setting == 0
    assert outcome.front.tolist() == [1]


def test_crc_by_hand():
    # (sum + 1) / (n + 1) <= 0.05 at n = 199 allows a sum of 9.
    assert crc(ones(0, 9, 10, count=199), 0.05) == 1
    # Two settings with 6 losses each, on different images: one after the other loses 12.
    first, second = ones(6, count=199)[0], ones(6, count=199)[0][::-1]
    assert crc([0 * first, first, second], 0.05) == 1
    assert crc([0 * first, first, first], 0.05) == 2


def test_pareto_front_against_all_pairs():
    rng = np.random.default_rng(0)
    risks = rng.integers(0, 12, 60)
    costs = 12 - risks + rng.integers(0, 6, 60)
    front = pareto_front(risks, costs)
    points = list(zip(risks.tolist(), costs.tolist(), strict=True))
    best = {
        (risk, cost)
        for risk, cost in points
        if not any(r <= risk and c <= cost and (r, c) != (risk, cost) for r, c in points)
    }
    assert [points[index] for index in front] == sorted(best)
    assert len(front) == len(best) > 3


def test_pareto_testing_finds_the_cheapest_safe_setting():
    # In disorder: safe and cheap, unsafe and cheapest, safe but dearer than another safe one.
    rng = np.random.default_rng(0)
    rates, costs = np.array([0, 0.03, 0.3, 0.02, 0.01]), np.array([10, 3, 1, 7, 5])
    losses = (rng.random((5, 600)) < rates[:, None]).astype(float)
    outcome = pareto_testing(losses, costs, 0.1, DELTA)
    assert outcome.setting == 1
    assert outcome.front.tolist() == [0, 4, 1, 2]
    assert (outcome.p_values <= DELTA).tolist() == [True, True, True, False]
    images = np.concatenate([outcome.choosing_images, outcome.testing_images])
    assert sorted(images.tolist()) == list(range(600))
    expected = hoeffding_bentkus_p_value(losses[4, outcome.testing_images], 0.1)
    assert outcome.p_values[1] == expected


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[settings, images\]"):
        crc(np.zeros(100), 0.1)
    with pytest.raises(ValueError, match="3 settings need as many costs"):
        pareto_testing(np.zeros((3, 100)), [1, 2], 0.1, DELTA)


# 12 settings whose risk is known; the level lies between the 6th and the 7th, and close to the
# 7th, so that a mistake is as likely as it can be.
RISK = 0.1
TRUE_RISKS = np.array([0, 0.02, 0.04, 0.05, 0.06, 0.07, 0.105, 0.11, 0.13, 0.16, 0.2, 0.3])
ROUNDS = 400
ALLOWED = DELTA + 3 * np.sqrt(DELTA * (1 - DELTA) / ROUNDS)


def simulated(seed, *, count=150, binary=True):
    """Losses of calibration images: what one image loses rises from safe to risky."""
    rng = np.random.default_rng(seed)
    images = rng.random(count)
    if binary:
        return (images < TRUE_RISKS[:, None]).astype(float)
    # Losses between 0 and 1 of the same means: a share of a loss that is twice as frequent.
    shares = rng.uniform(0.2, 0.8, count)
    return (images < 2 * TRUE_RISKS[:, None]) * shares


def share_of_violations(choose, **options):
    chosen = np.array([choose(simulated(seed, **options)) for seed in range(ROUNDS)])
    return (TRUE_RISKS[chosen] > RISK).mean(), chosen


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(
    "choose",
    [
        lambda losses: fixed_sequence(losses, RISK, DELTA),
        lambda losses: ucb(losses, RISK, DELTA),
        lambda losses: ucb(losses, RISK, DELTA, hoeffding_bentkus_ucb),
    ],
    ids=["fixed sequence", "WSR", "Hoeffding-Bentkus"],
)
def test_promise_is_kept_at_its_rate(choose, binary):
    violations, chosen = share_of_violations(choose, binary=binary)
    assert violations <= ALLOWED
    assert chosen.mean() > 1, "a selector that always says 0 keeps every promise"


def test_exact_test_keeps_the_promise_and_comes_near_it():
    def choose(losses):
        return fixed_sequence(losses, RISK, DELTA, binomial_p_value)

    violations, _ = share_of_violations(choose)
    assert 0.02 <= violations <= ALLOWED


@pytest.mark.parametrize(
    "choose",
    [
        # The first that was not rejected instead of the last that was.
        lambda losses: min(fixed_sequence(losses, RISK, DELTA, binomial_p_value) + 1, 11),
        # The riskiest whose mean on the calibration images is below the level.
        lambda losses: np.flatnonzero(losses.mean(axis=1) <= RISK).max(),
    ],
    ids=["one further", "no bound"],
)
def test_wrong_selectors_break_the_promise(choose):
    violations, _ = share_of_violations(choose)
    assert violations > 0.2 > ALLOWED


def shuffled_settings(losses, seed):
    """Settings in disorder behind the full cascade, each with copies that are as risky."""
    order = 1 + np.random.default_rng(seed).permutation(len(losses) - 1)
    order = np.concatenate([[0], order])
    return losses[order], order


def test_pareto_testing_keeps_its_promise():
    costs, chosen = 12 - np.arange(12), []
    for seed in range(ROUNDS):
        losses, order = shuffled_settings(simulated(seed, count=300), seed)
        chosen.append(order[pareto_testing(losses, costs[order], RISK, DELTA, seed=seed).setting])
    assert (TRUE_RISKS[chosen] > RISK).mean() <= ALLOWED
    assert np.mean(chosen) > 2


def test_choosing_and_testing_on_the_same_images_breaks_it():
    # 300 settings, all of them too risky: the luckiest one passes nearly always.
    passed = np.zeros((40, 2), bool)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        losses = np.concatenate([np.zeros((1, 300)), rng.random((300, 300)) < 1.1 * RISK])
        costs = np.concatenate([[10], np.ones(300)])
        front = pareto_front(losses.mean(axis=1), costs)
        luckiest = front[fixed_sequence(losses[front], RISK, DELTA)]
        passed[seed] = luckiest, pareto_testing(losses, costs, RISK, DELTA, seed=seed).setting
    on_the_same, on_others = passed.mean(axis=0)
    assert on_the_same > 0.5
    assert on_others <= DELTA + 3 * np.sqrt(DELTA * (1 - DELTA) / 40)


def test_crc_controls_the_expected_risk():
    chosen = np.array([crc(simulated(seed, count=60), RISK) for seed in range(ROUNDS)])
    risks = TRUE_RISKS[chosen]
    assert risks.mean() <= RISK + 3 * risks.std() / np.sqrt(ROUNDS)
    assert risks.mean() > 0.6 * RISK
    # It promises the mean alone: single calibrations go beyond the level.
    assert (risks > RISK).mean() > ALLOWED
