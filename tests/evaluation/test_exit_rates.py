"""Sums of exit statistics, worked out by hand."""

from __future__ import annotations

import pytest

from cascade_det.core.structures import CascadeStats
from cascade_det.evaluation import ExitEvaluator


def test_sums_over_batches_of_different_size(detector_output):
    evaluator = ExitEvaluator()
    first = CascadeStats(
        entered=[1000, 300, 100],
        left=[{"background": 600, "confident": 100}, {"background": 200}, {"completed": 100}],
    )
    second = CascadeStats(
        entered=[1000, 100, 0],
        left=[{"background": 900}, {"confident": 100}, {}],
    )
    evaluator.process([{}, {}, {}], detector_output([], stats=first))
    evaluator.process([{}], detector_output([], stats=second))
    figures = evaluator.evaluate()["exits"]
    assert figures["images"] == 4
    # 2000 + 400 + 100 stages computed for 2000 regions.
    assert figures["stages_per_region"] == pytest.approx(1.25)
    assert figures["stage0"] == {
        "entered": 2000,
        "entered_per_image": 500,
        "entered_share": 1,
        "exit_rate": 0.8,
        "left": {"background": 0.75, "confident": 0.05},
    }
    assert figures["stage1"] == {
        "entered": 400,
        "entered_per_image": 100,
        "entered_share": 0.2,
        "exit_rate": 0.75,
        "left": {"background": 0.5, "confident": 0.25},
    }
    assert figures["stage2"] == {
        "entered": 100,
        "entered_per_image": 25,
        "entered_share": 0.05,
        "exit_rate": 0,
        "left": {"completed": 1},
    }


def test_a_stage_that_no_region_reaches(detector_output):
    evaluator = ExitEvaluator()
    stats = CascadeStats([10, 0], [{"background": 10}, {}])
    evaluator.process([{}], detector_output([], stats=stats))
    figures = evaluator.evaluate()["exits"]
    assert figures["stage0"]["exit_rate"] == 1
    assert figures["stage1"]["exit_rate"] == figures["stage1"]["entered_share"] == 0
    assert figures["stage1"]["left"] == {}


def test_no_regions_and_no_batches(detector_output):
    evaluator = ExitEvaluator()
    assert evaluator.evaluate() == {"exits": {"images": 0, "stages_per_region": 0}}
    evaluator.process([{}], detector_output([], stats=CascadeStats([0], [{}])))
    assert evaluator.evaluate()["exits"]["stage0"]["entered_share"] == 0


def test_batches_with_another_number_of_stages_are_refused(detector_output):
    evaluator = ExitEvaluator()
    evaluator.process([{}], detector_output([], stats=CascadeStats([5], [{"completed": 5}])))
    with pytest.raises(ValueError, match="longer"):
        evaluator.process([{}], detector_output([], stats=CascadeStats([5, 1], [{}, {}])))


def test_reset_forgets_and_inputs_stay(detector_output):
    evaluator = ExitEvaluator()
    stats = CascadeStats([5], [{"completed": 5}])
    for _ in range(2):
        evaluator.reset()
        evaluator.process([{}], detector_output([], stats=stats))
        evaluator.process([{}], detector_output([], stats=stats))
        assert evaluator.evaluate()["exits"]["stage0"]["entered"] == 10
    assert stats == CascadeStats([5], [{"completed": 5}])
