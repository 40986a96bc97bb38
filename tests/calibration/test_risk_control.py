"""Fixed-sequence testing and its p-value, against formulas and promises with known risks."""

import numpy as np
import pytest
from scipy.stats import binom

from cascade_det.calibration.risk_control import (
    fixed_sequence,
    hoeffding_bentkus_p_value,
    pareto_front,
    smallest_sample,
)

DELTA = 0.1


def with_total(total, count=200):
    """``count`` losses with that sum: ones, a remainder, zeros."""
    losses = np.zeros(count)
    losses[: int(total)] = 1
    losses[int(total)] = total - int(total)
    return losses


@pytest.mark.parametrize(
    ("total", "count", "risk", "expected"),
    [
        (0, 100, 0.05, 0.005921),
        (0, 45, 0.05, 0.099440),
        (2, 100, 0.05, 0.296919),
        (5, 1000, 0.01, 0.179786),
        (20, 1000, 0.03, 0.090467),
        (10.5, 1000, 0.02, 0.055565),
    ],
)
def test_hoeffding_bentkus(total, count, risk, expected):
    losses = with_total(total, count)
    assert hoeffding_bentkus_p_value(losses, risk) == pytest.approx(expected, abs=6e-7)


def test_a_sum_of_floats_is_not_rounded_up_to_one_more():
    # A hundred times 0.07 is 7.000000000000001 in floating point.
    losses = np.concatenate([np.full(100, 0.07), np.zeros(200)])
    assert np.ceil(sum(losses.tolist())) == 8
    assert np.e * binom.cdf(7, 300, 0.05) < 1
    whole = hoeffding_bentkus_p_value(with_total(7, 300), 0.05)
    assert hoeffding_bentkus_p_value(losses, 0.05) == pytest.approx(whole, abs=1e-9)


@pytest.mark.parametrize(
    ("losses", "message"),
    [([0.5, 1.5], "from 0.5 to 1.5"), ([-0.1], "in"), ([np.nan], "in"), ([], "at least one")],
)
def test_losses_outside_0_to_1_are_refused(losses, message):
    with pytest.raises(ValueError, match=message):
        hoeffding_bentkus_p_value(losses, 0.1)


@pytest.mark.parametrize(("risk", "count"), [(0.05, 45), (0.02, 114), (0.01, 230), (0.005, 460)])
def test_the_smallest_sample_is_the_smallest_that_passes(risk, count):
    assert smallest_sample(risk, DELTA) == count
    assert fixed_sequence(np.zeros((3, count)), risk, DELTA) == 2
    assert fixed_sequence(np.zeros((3, count - 1)), risk, DELTA) == 0


def test_it_stops_at_the_first_failure():
    # 200 images, level 0.1: p-values of 0, 8, 30 ones are 7e-10, 0.005 and 1. What passes behind
    # the failure does not count, and is not run.
    read = []
    losses = (read.append(total) or with_total(total) for total in (0, 8, 30, 0, 8))
    assert fixed_sequence(losses, 0.1, DELTA) == 1
    assert read == [0, 8, 30]


@pytest.mark.parametrize("totals", [(30, 0, 0), (0, 30), (0,)])
def test_the_full_cascade_where_nothing_passes(totals):
    assert fixed_sequence([with_total(total) for total in totals], 0.1, DELTA) == 0


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
    assert [points.index(point) for point in sorted(best)] == front.tolist()
    assert len(best) > 3


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
def test_the_promise_is_kept_at_its_rate(binary):
    violations, chosen = share_of_violations(
        lambda losses: fixed_sequence(losses, RISK, DELTA), binary=binary
    )
    assert violations <= ALLOWED
    assert chosen.mean() > 1, "a selector that always says 0 keeps every promise"


def test_the_mean_of_the_calibration_images_alone_breaks_the_promise():
    violations, _ = share_of_violations(
        lambda losses: np.flatnonzero(losses.mean(axis=1) <= RISK).max()
    )
    assert violations > 0.2 > ALLOWED


def test_choosing_and_testing_on_the_same_images_breaks_the_promise():
    # 300 settings, all of them too risky: the luckiest one passes nearly always.
    passed = np.zeros((40, 2), bool)
    for seed in range(40):
        losses = np.random.default_rng(seed).random((300, 600)) < 1.1 * RISK
        luckiest = losses[losses[:, :300].mean(axis=1).argmin()]
        halves = luckiest[:300], luckiest[300:]
        passed[seed] = [fixed_sequence([half, half], RISK, DELTA) for half in halves]
    on_the_same, on_others = passed.mean(axis=0)
    assert on_the_same > 0.5
    assert on_others <= DELTA + 3 * np.sqrt(DELTA * (1 - DELTA) / 40)
