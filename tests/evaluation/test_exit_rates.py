"""Sums of exit statistics and what the heads compute, worked out by hand."""

from __future__ import annotations

import pytest

from cascade_det.core.structures import CascadeStats
from cascade_det.evaluation import ExitEvaluator, RegionFlops

FIRST = CascadeStats(
    entered=[1000, 300, 100],
    left=[{"background": 600, "confident": 100}, {"background": 200}, {"completed": 100}],
    proposed=1500,
    left_before={"background": 400, "redundant": 100},
    confidence=[{"background": 30.0, "confident": 95.0}, {"background": 5.0}, {"completed": 50.0}],
)
SECOND = CascadeStats(
    entered=[1000, 100, 0],
    left=[{"background": 900}, {"confident": 100}, {}],
    proposed=1000,
    confidence=[{"background": 0.0}, {"confident": 90.0}, {}],
    overrun_ms=7.5,
)


def test_sums_over_batches_of_different_size(detector_output):
    evaluator = ExitEvaluator()
    evaluator.process([{}, {}, {}], detector_output([], stats=FIRST))
    evaluator.process([{}], detector_output([], stats=SECOND))
    metrics = evaluator.evaluate()["exits"]
    assert metrics["images"] == 4
    # 2000 + 400 + 100 stages computed for 2500 proposals.
    assert metrics["stages_per_region"] == 1
    assert metrics["proposals"] == {
        "entered": 2500,
        "entered_per_image": 625,
        "entered_share": 1,
        "exit_rate": 0.2,
        "left": {"background": 0.16, "redundant": 0.04},
        "mean_score": {},
    }
    assert metrics["stage0"] == {
        "entered": 2000,
        "entered_per_image": 500,
        "entered_share": 0.8,
        "exit_rate": 0.8,
        "left": {"background": 0.75, "confident": 0.05},
        "mean_score": {"background": 0.02, "confident": 0.95},
    }
    assert metrics["stage1"] == {
        "entered": 400,
        "entered_per_image": 100,
        "entered_share": 0.16,
        "exit_rate": 0.75,
        "left": {"background": 0.5, "confident": 0.25},
        "mean_score": {"background": 0.025, "confident": 0.9},
    }
    assert metrics["stage2"] == {
        "entered": 100,
        "entered_per_image": 25,
        "entered_share": 0.04,
        "exit_rate": 0,
        "left": {"completed": 1},
        "mean_score": {"completed": 0.5},
    }
    assert (metrics["overrun_share"], metrics["overrun_ms"]) == (0.5, 7.5)


@pytest.mark.parametrize(
    ("scores", "done", "full"),
    [
        # 2000 x 1 + 400 x 2 + 100 x 4 million of 2500 x 7 million, over 4 images.
        ((0.0, 0.0, 0.0), 3.2, 17.5),
        # Final scores of 100 regions after each stage.
        ((1e6, 3e6, 7e6), 3.2 + 0.1 + 0.3 + 0.7, 2.5 * 14),
    ],
)
def test_flops_of_the_heads(detector_output, scores, done, full):
    evaluator = ExitEvaluator(RegionFlops(stages=(1e6, 2e6, 4e6), scores=scores))
    evaluator.process([{}, {}, {}], detector_output([], stats=FIRST))
    evaluator.process([{}], detector_output([], stats=SECOND))
    metrics = evaluator.evaluate()["exits"]
    assert metrics["head_gflops_per_image"] == pytest.approx(done / 4)
    assert metrics["full_head_gflops_per_image"] == pytest.approx(full / 4)
    assert metrics["head_flops_share"] == pytest.approx(done / full)


def test_a_stage_that_no_region_reaches(detector_output):
    evaluator = ExitEvaluator()
    stats = CascadeStats([10, 0], [{"background": 10}, {}], proposed=10)
    evaluator.process([{}], detector_output([], stats=stats))
    metrics = evaluator.evaluate()["exits"]
    assert metrics["stage0"]["exit_rate"] == 1
    assert metrics["stage1"]["exit_rate"] == metrics["stage1"]["entered_share"] == 0
    assert metrics["stage1"]["left"] == {}


def test_no_regions_and_no_batches(detector_output):
    evaluator = ExitEvaluator(RegionFlops((1e6,), (0.0,)))
    metrics = evaluator.evaluate()["exits"]
    assert (metrics["images"], metrics["stages_per_region"]) == (0, 0)
    assert metrics["overrun_share"] == 0
    evaluator.process([{}], detector_output([], stats=CascadeStats([0], [{}])))
    metrics = evaluator.evaluate()["exits"]
    assert metrics["stage0"]["entered_share"] == metrics["head_gflops_per_image"] == 0
    assert metrics["stage0"]["mean_score"] == {}


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


def test_shares_of_tiles(detector_output):
    evaluator = ExitEvaluator()
    assert "tiles" not in evaluator.evaluate()["exits"]
    for images, counts in ((3, (300, 30, 90)), (1, (100, 100, 100)), (1, (100, 0, 0))):
        gate = dict(zip(("tiles", "tiles_open", "tiles_computed"), counts, strict=True))
        stats = CascadeStats([5], [{"completed": 5}], **gate)
        evaluator.process([{}] * images, detector_output([], stats=stats))
    merged = ExitEvaluator()
    merged.merge([evaluator.state(), ExitEvaluator().state(), evaluator.state()])
    for one in (evaluator, merged):
        tiles = one.evaluate()["exits"]["tiles"]
        assert tiles == {"per_image": 100, "open_share": 0.26, "computed_share": 0.38}


def test_detections_that_got_a_mask(detector_output):
    evaluator = ExitEvaluator()
    for detected, masks in ((100, 40), (60, 8)):
        stats = CascadeStats([5], [{"completed": 5}], detected=detected, masks=masks)
        evaluator.process([{}, {}], detector_output([], stats=stats))
    merged = ExitEvaluator()
    merged.merge([evaluator.state(), ExitEvaluator().state(), evaluator.state()])
    for one in (evaluator, merged):
        masks = one.evaluate()["exits"]["masks"]
        assert masks == {"detections_per_image": 40, "masks_per_image": 12, "share": 0.3}
