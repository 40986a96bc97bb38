"""Bounds on a mean of losses, against numbers worked out from their formulas."""

import numpy as np
import pytest
from scipy.stats import binom

from cascade_det.calibration.risk_bounds import (
    binomial_p_value,
    binomial_ucb,
    hoeffding_bentkus_p_value,
    hoeffding_bentkus_ucb,
    hoeffding_ucb,
    wsr_ucb,
)

DELTA = 0.1
UCBS = (hoeffding_ucb, hoeffding_bentkus_ucb, binomial_ucb, wsr_ucb)


def with_total(total, count):
    """``count`` losses with that sum: ones, a remainder, zeros."""
    losses = np.zeros(count)
    losses[: int(total)] = 1
    losses[int(total)] = total - int(total)
    return losses


def every(step, count):
    return (np.arange(1, count + 1) % step == 0).astype(float)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (np.zeros(100), 0.02380),
        (np.zeros(500), 0.00475),
        (np.zeros(1000), 0.00237),
        (np.zeros(5000), 0.00047),
        (every(20, 100), 0.12326),
        (every(50, 1000), 0.03316),
        (every(100, 1000), 0.02390),
        (np.full(1000, 0.01), 0.01237),
    ],
)
def test_wsr(losses, expected):
    assert wsr_ucb(losses, DELTA, seed=None) == pytest.approx(expected, abs=6e-6)


@pytest.mark.parametrize(("count", "expected"), [(100, 0.10730), (1000, 0.03393)])
def test_hoeffding(count, expected):
    assert hoeffding_ucb(np.zeros(count), DELTA) == pytest.approx(expected, abs=6e-6)


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


@pytest.mark.parametrize(
    ("total", "count", "risk", "expected"),
    [(2, 100, 0.05, 0.118263), (5, 1000, 0.01, 0.066140), (20, 1000, 0.03, 0.033281)],
)
def test_binomial(total, count, risk, expected):
    assert binomial_p_value(with_total(total, count), risk) == pytest.approx(expected, abs=6e-7)


def test_a_sum_of_floats_is_not_rounded_up_to_one_more():
    # A hundred times 0.07 is 7.000000000000001 in floating point.
    losses = np.concatenate([np.full(100, 0.07), np.zeros(200)])
    assert np.ceil(sum(losses.tolist())) == 8
    expected = np.e * binom.cdf(7, 300, 0.05)
    whole = hoeffding_bentkus_p_value(with_total(7, 300), 0.05)
    assert expected < 1
    assert hoeffding_bentkus_p_value(losses, 0.05) == pytest.approx(whole, abs=1e-9)


@pytest.mark.parametrize("total", [0, 3, 40.5, 99.5])
def test_p_value_at_the_bound_is_delta(total):
    losses = with_total(total, 100)
    bound = hoeffding_bentkus_ucb(losses, DELTA)
    assert hoeffding_bentkus_p_value(losses, bound) == pytest.approx(DELTA, abs=1e-6)
    if float(total).is_integer():
        bound = binomial_ucb(losses, DELTA)
        assert binomial_p_value(losses, bound) == pytest.approx(DELTA, abs=1e-9)


@pytest.mark.parametrize("bound", UCBS)
def test_bounds_are_above_the_mean_and_at_most_1(bound):
    for losses in (np.zeros(1), np.ones(1), every(2, 30), np.ones(50)):
        assert losses.mean() < bound(losses, DELTA) <= 1 or losses.mean() == 1
    assert bound(np.ones(50), DELTA) == 1


def test_wsr_shuffles_with_its_seed():
    losses = every(20, 100)
    assert wsr_ucb(losses, DELTA) == wsr_ucb(losses, DELTA, seed=0)
    assert wsr_ucb(losses, DELTA) != wsr_ucb(losses, DELTA, seed=1)
    assert wsr_ucb(np.sort(losses), DELTA, seed=None) != wsr_ucb(losses, DELTA, seed=None)


@pytest.mark.parametrize("bound", UCBS)
def test_bounds_fail_as_often_as_promised(bound):
    # Half of the draws are of losses that often are 0, where a bound is tightest.
    rng = np.random.default_rng(0)
    rounds, mean = 300, 0.05
    failures = sum(
        bound((rng.random(60) < mean).astype(float), DELTA) < mean for _ in range(rounds)
    )
    assert failures / rounds <= DELTA + 3 * np.sqrt(DELTA * (1 - DELTA) / rounds)


def test_p_values_of_many_settings_at_once():
    losses = np.random.default_rng(0).random((4, 50)) ** 4
    together = hoeffding_bentkus_p_value(losses, 0.3)
    assert together.tolist() == [hoeffding_bentkus_p_value(row, 0.3) for row in losses]
    assert len(set(together.tolist())) > 2


@pytest.mark.parametrize(
    ("losses", "message"),
    [([0.5, 1.5], "from 0.5 to 1.5"), ([-0.1], "in"), ([np.nan], "in"), ([], "at least one")],
)
def test_losses_outside_0_to_1_are_refused(losses, message):
    for bound in (*UCBS, hoeffding_bentkus_p_value, binomial_p_value):
        with pytest.raises(ValueError, match=message):
            bound(losses, DELTA)
    with pytest.raises(ValueError, match="0 and 1 alone"):
        binomial_p_value([0.5], DELTA)
    with pytest.raises(ValueError, match="delta must be between 0 and 1, not 1"):
        wsr_ucb([0.5], 1)
