"""Bounds of a mean: whether they hold as often as they say, and are narrow enough."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from cascade_det.evaluation.mean_bounds import mean_interval, mean_upper_bound


def test_without_samples_nothing_is_known():
    assert mean_interval([]) == (0, 1)


def capital(samples, mean, confidence):
    """What betting on a mean above ``mean`` makes of 1, sample by sample, in plain Python."""
    won, seen = 1.0, []
    for number, sample in enumerate(samples, start=1):
        means = [(0.5 + sum(seen[: i + 1])) / (i + 2) for i in range(len(seen))]
        spread = sum((x - m) ** 2 for x, m in zip(seen, means, strict=True))
        variance = (0.25 + spread) / (len(seen) + 1)
        stake = math.sqrt(2 * math.log(2 / (1 - confidence)) / (variance * number))
        stake = min(stake / math.sqrt(math.log(1 + number)), 0.75 / mean)
        won *= 1 + stake * (sample - mean)
        seen.append(sample)
    return won


@pytest.mark.parametrize("seed", range(4))
def test_at_the_ends_the_capital_has_grown_just_enough(seed):
    rng = np.random.default_rng(seed)
    samples = (rng.random(80) ** 4).tolist()
    low, high = mean_interval(samples, confidence=0.9)
    assert 0.02 < low < np.mean(samples) < high < 0.98
    assert capital(samples, low, 0.9) == pytest.approx(20, rel=1e-6)
    mirrored = [1 - sample for sample in samples]
    assert capital(mirrored, 1 - high, 0.9) == pytest.approx(20, rel=1e-6)


DRAWS = {
    "zeros": lambda rng, n: np.zeros(n),
    "ones": lambda rng, n: np.ones(n),
    "rare": lambda rng, n: (rng.random(n) < 0.05).astype(float),
    "coins": lambda rng, n: (rng.random(n) < 0.5).astype(float),
    "shares": lambda rng, n: (rng.random(n) < 0.1) * rng.choice([0.25, 0.5, 1.0], n),
    "even": lambda rng, n: rng.random(n),
}
MEANS = {"zeros": 0, "ones": 1, "rare": 0.05, "coins": 0.5, "shares": 0.1 * 1.75 / 3, "even": 0.5}


@pytest.mark.parametrize("name", DRAWS)
def test_all_intervals_of_a_stream_hold_together(name):
    """Looking after every tenth sample, at most 1 of 10 streams has any wrong interval."""
    rng = np.random.default_rng(1)
    streams, missed = 60, 0
    for _ in range(streams):
        samples = DRAWS[name](rng, 120)
        looks = (mean_interval(samples[:n], confidence=0.9) for n in range(10, 121, 10))
        missed += any(not low <= MEANS[name] <= high for low, high in looks)
    # As many would be missed in a hundred thousand such tests, were it 1 in 10 streams.
    assert missed <= binom.ppf(1 - 1e-5, streams, 0.1)
    assert missed < 0.1 * streams


def test_the_normal_approximation_would_not_hold_where_this_does():
    rng = np.random.default_rng(2)
    missed = {"normal": 0, "ours": 0}
    for _ in range(150):
        samples = DRAWS["rare"](rng, 30)
        width = 1.645 * samples.std() / math.sqrt(30)
        missed["normal"] += not abs(samples.mean() - 0.05) <= width
        low, high = mean_interval(samples, confidence=0.9)
        missed["ours"] += not low <= 0.05 <= high
    assert missed["normal"] > 0.15 * 150
    assert missed["ours"] < 0.1 * 150


@pytest.mark.parametrize(
    ("name", "count", "widest"), [("zeros", 100, 0.05), ("rare", 1000, 0.07), ("even", 1000, 0.1)]
)
def test_intervals_are_narrow_enough_to_be_of_use(name, count, widest):
    low, high = mean_interval(DRAWS[name](np.random.default_rng(0), count))
    assert high - low < widest


@settings(max_examples=40)
@given(samples=st.lists(st.floats(0, 1), max_size=30))
def test_intervals_lie_in_the_range_and_are_symmetric(samples):
    low, high = mean_interval(samples)
    assert 0 <= low <= high <= 1
    mirrored = mean_interval([1 - sample for sample in samples])
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-6)
    ends = [mean_interval(samples, confidence=c) for c in (0.5, 0.9, 0.99)]
    for (inner_low, inner_high), (outer_low, outer_high) in itertools.pairwise(ends):
        assert outer_low <= inner_low + 1e-9
        assert inner_high <= outer_high + 1e-9


@pytest.mark.parametrize("ones", [10, 100, 900])
def test_in_a_stream_that_changes_the_interval_has_the_mean_of_the_samples(ones):
    low, high = mean_interval([0.0] * 100 + [1.0] * ones)
    assert 0 <= low < ones / (100 + ones) <= high < 1


@pytest.mark.parametrize("wrong", [-0.01, 1.01, math.nan])
def test_what_is_no_loss_is_refused(wrong):
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        mean_interval([0.5, wrong])


def every(step, count):
    return (np.arange(1, count + 1) % step == 0).astype(float)


def unshuffled(losses):
    """Losses that the bound shuffles into the given order."""
    order = np.random.default_rng(0).permutation(len(losses))
    before = np.empty(len(losses))
    before[order] = losses
    return before


class TestUpperBound:
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
    def test_by_its_formula(self, losses, expected):
        assert mean_upper_bound(unshuffled(losses), 0.1) == pytest.approx(expected, abs=6e-6)

    def test_it_is_above_the_mean_and_at_most_1(self):
        for losses in (np.zeros(1), np.ones(1), every(2, 30), np.ones(50)):
            assert losses.mean() < mean_upper_bound(losses, 0.1) <= 1 or losses.mean() == 1
        assert mean_upper_bound(np.ones(50), 0.1) == 1

    def test_it_fails_as_often_as_promised(self):
        rng = np.random.default_rng(0)
        rounds, mean = 300, 0.05
        draws = ((rng.random(60) < mean).astype(float) for _ in range(rounds))
        failures = sum(mean_upper_bound(losses, 0.1) < mean for losses in draws)
        assert failures / rounds <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / rounds)

    @pytest.mark.parametrize(
        ("losses", "delta", "message"),
        [
            ([0.5, 1.5], 0.1, "from 0.5 to 1.5"),
            ([math.nan], 0.1, "in"),
            ([], 0.1, "at least one"),
            ([0.5], 1, "delta must be between 0 and 1, not 1"),
        ],
    )
    def test_refused_input(self, losses, delta, message):
        with pytest.raises(ValueError, match=message):
            mean_upper_bound(losses, delta)
