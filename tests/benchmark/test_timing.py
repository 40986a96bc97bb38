"""Runs in turn, and what is made of their times."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade_det.benchmark.timing import Spread, alternate, ratio

times = st.floats(0.01, 1e6)


class Clock:
    """Every call takes as many seconds as it says."""

    def __init__(self):
        self.now = 0.0
        self.order = []

    def __call__(self):
        return self.now

    def call(self, name, seconds):
        def run(number):
            self.order.append((name, number))
            self.now += seconds[number] if isinstance(seconds, list) else seconds

        return run


def test_calls_run_in_turn_and_the_warm_up_does_not_count():
    clock = Clock()
    calls = {"a": clock.call("a", [9.0, 1.0, 2.0]), "b": clock.call("b", [9.0, 3.0, 5.0])}
    taken = alternate(calls, rounds=2, warmup=1, clock=clock)
    assert clock.order == [(name, number) for number in range(3) for name in "ab"]
    assert taken == {"a": [1000.0, 2000.0], "b": [3000.0, 5000.0]}


def test_no_round_begins_after_the_time_is_over_but_one_is_measured():
    clock = Clock()
    calls = {name: clock.call(name, 4.0) for name in "ab"}
    taken = alternate(calls, rounds=10, warmup=1, seconds=20.0, clock=clock)
    # 8 seconds of warm-up; the rounds begin at 8 and 16, and the third would at 24.
    assert taken == {"a": [4000.0] * 2, "b": [4000.0] * 2}
    assert alternate(calls, rounds=10, warmup=1, seconds=1.0, clock=clock) == {
        "a": [4000.0],
        "b": [4000.0],
    }


@given(st.lists(times, min_size=1, max_size=20))
def test_a_spread_is_the_median_and_the_quartiles(samples):
    spread = Spread.of(samples)
    wanted = np.quantile(samples, [0.25, 0.5, 0.75])
    assert [spread.low, spread.median, spread.high] == pytest.approx(wanted.tolist())
    assert list(spread.samples) == samples


def test_a_ratio_is_that_of_the_pairs():
    # 10 / 2, 12 / 4, 40 / 4: by hand 5, 3, 10, between which quartiles are halfway.
    spread = ratio([10.0, 12.0, 40.0], [2.0, 4.0, 4.0])
    assert (spread.low, spread.median, spread.high) == (4.0, 5.0, 7.5)


@given(st.lists(st.tuples(times, times), min_size=1, max_size=9), st.floats(0.5, 8.0))
def test_a_machine_that_gets_slower_changes_no_ratio(pairs, factor):
    of, to = zip(*pairs, strict=True)
    slower = [factor**number for number in range(len(pairs))]
    shifted = [[time * f for time, f in zip(side, slower, strict=True)] for side in (of, to)]
    assert ratio(*shifted).median == pytest.approx(ratio(of, to).median)


@pytest.mark.parametrize(("of", "to"), [([], []), ([1.0], [1.0, 2.0])])
def test_samples_without_a_partner_are_no_pairs(of, to):
    with pytest.raises(ValueError, match="no pairs"):
        ratio(of, to)


def test_what_comes_before_a_call_is_not_timed():
    clock = Clock()
    before = clock.call("before", 100.0)
    taken = alternate(
        {"a": clock.call("a", 1.0)},
        rounds=2,
        warmup=0,
        before=lambda name, number: before(number),
        clock=clock,
    )
    assert clock.order == [("before", 0), ("a", 0), ("before", 1), ("a", 1)]
    assert taken == {"a": [1000.0, 1000.0]}


def test_contenders_of_a_round_are_next_to_each_other():
    clock = Clock()
    alternate({name: clock.call(name, 1.0) for name in "abc"}, rounds=4, warmup=0, clock=clock)
    names = [name for name, _ in clock.order]
    assert all(a != b for a, b in itertools.pairwise(names))
    assert names == list("abc") * 4
