"""Times of the parts of a model that has no timer."""

import itertools
from types import SimpleNamespace

import pytest

from cascade_det.benchmark.marks import Marks


def make_model(clock):
    """A model of two parts, one of which runs twice; each call takes its seconds."""

    def work(seconds):
        def run(value, *_):
            clock[0] += seconds
            return value + 1

        return run

    model = SimpleNamespace(first=work(1.0), stage=work(2.0))
    model.run = lambda: model.stage(model.stage(model.first(0), "0"), "1")
    return model


def test_a_part_ends_where_the_next_begins():
    clock = [0.0]
    model = make_model(clock)
    functions = model.first, model.stage
    marks = Marks(clock=lambda: clock[0])
    with marks.watching(
        [(model, "first", "first"), (model, "stage", lambda _, number: f"stage{number}")]
    ):
        assert model.run() == 3
    assert marks.milliseconds == {"first": 1000.0, "stage0": 2000.0, "stage1": 2000.0}
    assert (model.first, model.stage) == functions


def test_runs_add_up_and_what_is_between_them_does_not_count():
    clock = itertools.count()
    marks = Marks(clock=lambda: next(clock))
    for _ in range(3):
        marks.begin("part")
        marks.begin(None)
    assert marks.milliseconds == {"part": 3000.0}


def test_an_error_leaves_the_model_as_it_was():
    model = make_model([0.0])
    first = model.first
    with pytest.raises(ZeroDivisionError), Marks().watching([(model, "first", "first")]):
        raise ZeroDivisionError
    assert model.first is first
