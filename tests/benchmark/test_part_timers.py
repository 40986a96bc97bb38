"""Part times of a model that takes no timer."""

from types import SimpleNamespace

import pytest

from cascade_det.benchmark.part_timers import time_parts
from cascade_det.core import PartTimer


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


def make_model(clock):
    """A model with two parts; the second runs twice. Each call takes its seconds."""

    def work(seconds):
        def run(value, *_):
            clock[0] += seconds
            return value + 1

        return run

    model = SimpleNamespace(first=work(1.0), stage=work(2.0))
    model.run = lambda: model.stage(model.stage(model.first(0), "0"), "1")
    return model


def test_a_part_ends_where_the_next_starts(clock):
    model, timer = make_model(clock), PartTimer()
    functions = model.first, model.stage
    starts = [(model, "first", "first"), (model, "stage", lambda _, number: f"stage{number}")]
    for _ in range(2):
        with time_parts(timer, starts):
            assert model.run() == 3
        clock[0] += 9.0  # between calls: does not count
    assert timer.milliseconds == {"first": 2000.0, "stage0": 4000.0, "stage1": 4000.0}
    assert (model.first, model.stage) == functions


def test_an_error_leaves_the_model_unchanged(clock):
    model = make_model(clock)
    first = model.first
    with pytest.raises(ZeroDivisionError), time_parts(PartTimer(), [(model, "first", "first")]):
        raise ZeroDivisionError
    assert model.first is first
