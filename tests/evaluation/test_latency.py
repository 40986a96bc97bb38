"""Medians, percentiles and the largest saving against numpy and hand-made times."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cascade_det.core.structures import CascadeStats
from cascade_det.evaluation import LatencyEvaluator

NO_EXITS = [{}, {"completed": 5}]
EXITS = [{"background": 4}, {"completed": 1}]


def feed(evaluator, detector_output, times, images=1, left=NO_EXITS):
    batch = [{"image": torch.zeros(3, 32, 48, dtype=torch.uint8)}] * images
    stats = CascadeStats([5, 5], left, dict(times))
    evaluator.process(batch, detector_output([], stats=stats))


def test_percentiles_equal_numpy_after_the_warm_up(detector_output):
    rng = np.random.default_rng(0)
    backbone, stage0 = rng.gamma(4, 5, 25), rng.gamma(3, 2, 25)
    backbone[:3] = 10_000  # The warm-up.
    evaluator = LatencyEvaluator(warmup=3)
    for first, second in zip(backbone, stage0, strict=True):
        feed(evaluator, detector_output, {"backbone": first, "stage0": second}, images=4)
    latency = evaluator.evaluate()["latency"]
    per_image = {"backbone": backbone[3:] / 4, "stage0": stage0[3:] / 4}
    for part, values in per_image.items():
        assert latency["parts"][part]["median_ms"] == pytest.approx(np.median(values))
        assert latency["parts"][part]["p95_ms"] == pytest.approx(np.percentile(values, 95))
    total = per_image["backbone"] + per_image["stage0"]
    assert latency["total"]["median_ms"] == pytest.approx(np.median(total))
    assert latency["total"]["p95_ms"] == pytest.approx(np.percentile(total, 95))
    assert (latency["batch_size"], latency["images"], latency["batches"]) == (4, 88, 22)
    assert latency["warmup_batches"] == 3
    assert latency["input_size"] == {"height": 32, "width": 48}
    assert latency["notes"] == []


def test_a_smaller_last_batch_is_divided_by_its_own_size(detector_output):
    evaluator = LatencyEvaluator(warmup=0)
    for images in (4, 4, 1):
        feed(evaluator, detector_output, {"rpn": 10.0 * images}, images=images)
    latency = evaluator.evaluate()["latency"]
    assert latency["parts"]["rpn"] == {"median_ms": 10, "p95_ms": 10}
    assert (latency["batch_size"], latency["images"]) == (4, 9)


@pytest.mark.parametrize(("warmup", "median"), [(5, 20), (3, 20), (2, 20), (1, 15)])
def test_batches_of_the_warm_up_count_if_there_are_no_others(detector_output, warmup, median):
    evaluator = LatencyEvaluator(warmup)
    for time in (30.0, 10.0, 20.0):
        feed(evaluator, detector_output, {"rpn": time})
    latency = evaluator.evaluate()["latency"]
    assert latency["parts"]["rpn"]["median_ms"] == median
    assert latency["warmup_batches"] == (warmup if warmup < 3 else 0)
    told = (
        f"Only 3 batches were timed, no more than the {warmup} for warming up: all of them count, "
        "including the first ones."
    )
    assert latency["notes"] == ([told] if warmup >= 3 else [])


def test_a_stage_that_did_not_run_took_no_time(detector_output):
    evaluator = LatencyEvaluator(warmup=0)
    feed(evaluator, detector_output, {"stage0": 5.0, "postprocess": 1.0})
    feed(evaluator, detector_output, {"stage0": 5.0, "stage1": 4.0, "postprocess": 1.0})
    latency = evaluator.evaluate()["latency"]
    assert latency["parts"]["stage1"]["median_ms"] == 2
    assert list(latency["parts"]) == ["stage0", "stage1", "postprocess"]


def test_saving_from_the_plain_cascade(detector_output):
    evaluator = LatencyEvaluator(warmup=0)
    times = {"backbone": 50, "rpn": 10, "stage0": 20, "stage1": 15, "stage2": 5}
    feed(evaluator, detector_output, times)
    latency = evaluator.evaluate()["latency"]
    assert latency["most_exits_could_save"] == pytest.approx(20 / 100)
    assert "full_parts" not in latency


def test_saving_from_the_second_pass_without_exits(detector_output):
    evaluator = LatencyEvaluator(warmup=0)
    times = {"backbone": 50, "stage0": 21, "stage1": 3, "postprocess": 10}
    feed(evaluator, detector_output, times | {"full/stage0": 20, "full/stage1": 20}, left=EXITS)
    latency = evaluator.evaluate()["latency"]
    # 50 + 20 + 20 + 10 in full, of which the second stage takes 20.
    assert latency["most_exits_could_save"] == pytest.approx(0.2)
    assert latency["total"]["median_ms"] == 84
    assert latency["full_total"]["median_ms"] == 100
    assert list(latency["parts"]) == ["backbone", "stage0", "stage1", "postprocess"]
    assert latency["full_parts"]["stage1"]["median_ms"] == 20
    assert latency["full_parts"]["backbone"]["median_ms"] == 50


def test_second_pass_counts_where_no_region_reached_a_stage(detector_output):
    evaluator = LatencyEvaluator(warmup=0)
    feed(
        evaluator, detector_output, {"stage0": 10, "full/stage0": 10, "full/stage1": 30}, left=EXITS
    )
    latency = evaluator.evaluate()["latency"]
    assert latency["most_exits_could_save"] == pytest.approx(0.75)
    assert list(latency["full_parts"]) == ["stage0", "stage1"]


def test_saving_is_unknown_with_exits_alone(detector_output):
    evaluator = LatencyEvaluator(warmup=0)
    feed(evaluator, detector_output, {"stage0": 20, "stage1": 3}, left=EXITS)
    latency = evaluator.evaluate()["latency"]
    assert math.isnan(latency["most_exits_could_save"])
    assert "stages=True" in latency["notes"][0]


def test_background_after_the_last_stage_is_no_early_exit(detector_output):
    evaluator = LatencyEvaluator(warmup=0)
    left = [{}, {"background": 5}]
    feed(evaluator, detector_output, {"stage0": 10, "stage1": 10}, left=left)
    assert evaluator.evaluate()["latency"]["most_exits_could_save"] == pytest.approx(0.5)


def test_gates_are_parts_of_their_own(detector_output):
    evaluator = LatencyEvaluator(warmup=0)
    times = {"gate0": 1, "stage0": 20, "gate1": 2, "stage1": 3, "rpn": 4}
    full = {"full/stage0": 20, "full/stage1": 30}
    feed(evaluator, detector_output, times | full, left=EXITS)
    latency = evaluator.evaluate()["latency"]
    assert list(latency["parts"]) == ["rpn", "gate0", "stage0", "gate1", "stage1"]
    assert list(latency["full_parts"]) == ["rpn", "stage0", "stage1"]
    assert (latency["total"]["median_ms"], latency["full_total"]["median_ms"]) == (30, 54)


@pytest.mark.parametrize(("gate", "costs_more"), [(23.9, False), (24.1, True)])
def test_a_gate_that_takes_longer_than_what_left_would_is_named(detector_output, gate, costs_more):
    evaluator = LatencyEvaluator(warmup=0)
    times = {"stage0": 20, "gate1": gate, "stage1": 3, "full/stage0": 20, "full/stage1": 30}
    for images in (1, 2):
        # Four of five regions left after stage 0: 24 of the 30 ms of stage 1.
        scaled = {part: time * images for part, time in times.items()}
        feed(evaluator, detector_output, scaled, images=images, left=EXITS)
    told = (
        "The exits after stage 0 take 24.1 ms per image, and the regions that leave there would "
        "take 24 ms in the stages after them: MODEL.CASCADE.EXIT.GATES_OFF [1] is faster here."
    )
    assert evaluator.evaluate()["latency"]["notes"] == [told] * costs_more


@pytest.mark.parametrize(("gate", "costs_more"), [(28.9, False), (29.1, True)])
def test_tiles_beside_the_whole_map(detector_output, gate, costs_more):
    """The full cascade computes the whole map, and the RPN on it, anew."""
    evaluator = LatencyEvaluator(warmup=0)
    times = {"backbone": 50, "rpn": 4, "tile gate": gate, "stage0": 20, "stage1": 3}
    second = {"tile gate": 20, "rpn": 13, "stage0": 20, "stage1": 30}
    full = {f"full/{name}": time for name, time in second.items()}
    for images in (1, 2):
        scaled = {part: time * images for part, time in (times | full).items()}
        feed(evaluator, detector_output, scaled, images=images, left=EXITS)
    latency = evaluator.evaluate()["latency"]
    for parts, total in (("parts", times), ("full_parts", {"backbone": 50, **second})):
        assert list(latency[parts]) == ["backbone", "tile gate", "rpn", "stage0", "stage1"]
        medians = {name: own["median_ms"] for name, own in latency[parts].items()}
        assert medians == pytest.approx(total)
        key = parts.replace("parts", "total")
        assert latency[key]["median_ms"] == pytest.approx(sum(total.values()))
    told = (
        "With the tile gate, finest map and RPN take 33.1 ms per image, and 33 ms without: "
        "MODEL.CASCADE.EXIT.TILE_THRESHOLD 0 is faster here."
    )
    assert latency["notes"] == [told] * costs_more


def test_a_gate_before_the_stages_that_costs_more_is_named(detector_output):
    evaluator = LatencyEvaluator(warmup=0)
    batch = [{"image": torch.zeros(3, 32, 48, dtype=torch.uint8)}]
    times = {"gate0": 6.0, "stage0": 4.0, "full/stage0": 8.0, "full/stage1": 2.0}
    left = {"proposed": 10, "left_before": {"budget": 5}, "milliseconds": times}
    stats = CascadeStats([5, 5], NO_EXITS, **left)
    evaluator.process(batch, detector_output([], stats=stats))
    (note,) = evaluator.evaluate()["latency"]["notes"]
    assert note.startswith("The exits before stage 0 take 6 ms per image")
    assert "would take 5 ms" in note
    assert "GATES_OFF [0]" in note


def test_without_times(detector_output):
    evaluator = LatencyEvaluator()
    feed(evaluator, detector_output, {})
    latency = evaluator.evaluate()["latency"]
    assert latency["images"] == 0
    assert "timer" in latency["notes"][0]


def test_reset_forgets(detector_output):
    evaluator = LatencyEvaluator(warmup=0)
    feed(evaluator, detector_output, {"rpn": 100.0})
    evaluator.reset()
    feed(evaluator, detector_output, {"rpn": 1.0})
    assert evaluator.evaluate()["latency"]["parts"]["rpn"]["median_ms"] == 1


def test_any_part_may_be_timed_again_without_exits(detector_output):
    evaluator = LatencyEvaluator(warmup=0)
    times = {"stage0": 10, "postprocess": 2, "full/stage0": 10, "full/postprocess": 6}
    feed(evaluator, detector_output, times, left=EXITS)
    latency = evaluator.evaluate()["latency"]
    assert (latency["total"]["median_ms"], latency["full_total"]["median_ms"]) == (12, 16)


def test_every_process_warms_up(detector_output):
    merged = LatencyEvaluator(warmup=2)
    states = []
    for slow, times in ((1000.0, [10.0, 20.0]), (2000.0, [30.0]), (3000.0, [])):
        evaluator = LatencyEvaluator(warmup=2)
        for time in [slow, slow, *times]:
            feed(evaluator, detector_output, {"rpn": time})
        states.append(evaluator.state())
    merged.merge([*states, []])
    latency = merged.evaluate()["latency"]
    assert latency["parts"]["rpn"] == {"median_ms": 20, "p95_ms": pytest.approx(29)}
    assert (latency["batches"], latency["warmup_batches"]) == (3, 6)
    assert "4 processes that ran at once" in latency["notes"][0]


def test_exits_of_any_process_are_exits_of_all(detector_output):
    first, second = LatencyEvaluator(warmup=0), LatencyEvaluator(warmup=0)
    feed(first, detector_output, {"stage0": 20, "stage1": 3}, left=EXITS)
    feed(second, detector_output, {"stage0": 20, "stage1": 3})
    second.merge([second.state(), first.state()])
    assert math.isnan(second.evaluate()["latency"]["most_exits_could_save"])


def test_masks_are_made_once_without_exits(detector_output):
    """Those of earlier stages are for the AP per stage alone."""
    evaluator = LatencyEvaluator(warmup=0)
    times = {"stage0": 10, "postprocess": 2, "masks": 30}
    second = {"stage0": 10, "masks0": 50, "stage1": 5, "masks1": 60}
    full = {f"full/{name}": time for name, time in second.items()}
    feed(evaluator, detector_output, times | full, left=EXITS)
    latency = evaluator.evaluate()["latency"]
    assert (latency["total"]["median_ms"], latency["full_total"]["median_ms"]) == (42, 77)
    assert list(latency["parts"]) == ["stage0", "postprocess", "masks"]
    assert list(latency["full_parts"]) == ["stage0", "stage1", "postprocess", "masks"]
    assert latency["full_parts"]["masks"]["median_ms"] == 60
    assert latency["most_exits_could_save"] == pytest.approx(5 / 77)
