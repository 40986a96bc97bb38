"""Calls that take turns, and ratios of their times."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade_det.benchmark.timing import alternate, ratio, spread

times = st.floats(0.01, 1e6)


class Clock:
    """Advances by the seconds of each call."""

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


def test_calls_take_turns_and_the_warm_up_does_not_count():
    clock = Clock()
    calls = {"a": clock.call("a", [9.0, 1.0, 2.0]), "b": clock.call("b", [9.0, 3.0, 5.0])}
    taken = alternate(calls, rounds=2, warmup=1, clock=clock)
    assert clock.order == [(name, number) for number in range(3) for name in "ab"]
    assert taken == {"a": [1000.0, 2000.0], "b": [3000.0, 5000.0]}


@pytest.mark.parametrize(("seconds", "rounds"), [(20.0, 2), (1.0, 1)])
def test_no_round_starts_after_the_time_limit_but_one_is_measured(seconds, rounds):
    clock = Clock()
    calls = {name: clock.call(name, 4.0) for name in "ab"}
    # Warm-up takes 8 seconds; rounds start at 8 and 16, and the third would at 24.
    taken = alternate(calls, rounds=10, warmup=1, seconds=seconds, clock=clock)
    assert taken == {"a": [4000.0] * rounds, "b": [4000.0] * rounds}


def test_preparing_a_call_is_not_timed():
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


@given(st.lists(times, min_size=1, max_size=20))
def test_a_spread_has_median_and_quartiles(samples):
    found = spread(samples)
    wanted = np.quantile(samples, [0.25, 0.5, 0.75])
    assert [found["low"], found["median"], found["high"]] == pytest.approx(wanted.tolist())
    assert found["samples"] == samples


def test_a_ratio_is_that_of_the_pairs():
    # 10 / 2, 12 / 4, 40 / 4: 5, 3, 10, with quartiles halfway between them.
    found = ratio([10.0, 12.0, 40.0], [2.0, 4.0, 4.0])
    assert (found["low"], found["median"], found["high"]) == (4.0, 5.0, 7.5)


@given(st.lists(st.tuples(times, times), min_size=1, max_size=9), st.floats(0.5, 8.0))
def test_a_machine_that_gets_slower_changes_no_ratio(pairs, factor):
    baseline, ours = zip(*pairs, strict=True)
    slower = [factor**number for number in range(len(pairs))]
    shifted = [[t * f for t, f in zip(side, slower, strict=True)] for side in (baseline, ours)]
    assert ratio(*shifted)["median"] == pytest.approx(ratio(baseline, ours)["median"])
