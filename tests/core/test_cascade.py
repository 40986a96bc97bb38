"""Inference against the naive cascade, per-stage output, dtypes, gradients, arguments."""

from itertools import pairwise

import pytest
import torch
from small_cascades import (
    CHANNELS,
    POOLED,
    STRIDES,
    as_detections,
    assert_same_detections,
    detect,
    detect_stages,
    make_cascade,
    make_scene,
    naive_twin,
    record_calls,
    truncate,
)

from cascade_det.core import ConvFCBoxHead, ExitPolicy, PartTimer, RoIPooler
from cascade_det.core.ensemble import ENSEMBLES

THRESHOLDS = {"thresholds": (0.7, 0.65, 0.6), "prune_thresholds": (0.35, 0.3, 0.25)}


def exits_for(num_stages):
    return ExitPolicy(
        num_stages=num_stages,
        **{name: values[: num_stages - 1] for name, values in THRESHOLDS.items()},
    )


def assert_equals_naive(cascade, scene):
    """Compare detections, counts, and the pooled boxes; return the statistics."""
    naive = naive_twin(cascade).detect(scene.features, scene.proposals, scene.image_sizes)
    boxes_before = [stage.boxes_before for stage in detect_stages(cascade, scene)]
    pooled, rows = record_calls(cascade)
    detections, stats = detect(cascade, scene)
    wanted = as_detections(naive.detections)
    assert min(len(d) for d in wanted) > 3
    assert_same_detections(detections, wanted)

    entered = [len(survivors) for survivors in naive.survivors]
    assert stats.entered == entered
    assert stats.left == naive.left
    assert [len(boxes) for boxes, _ in pooled] == [n for n in entered if n]
    for stage, (boxes, image_index) in enumerate(pooled):
        survivors = naive.survivors[stage]
        assert image_index.tolist() == [image for image, _ in survivors]
        same_regions = [boxes_before[stage][image][row] for image, row in survivors]
        torch.testing.assert_close(boxes, torch.stack(same_regions), rtol=1e-4, atol=1e-4)
    if cascade.ensemble.name != "last_boxes":
        assert rows == [[n, n] if n else [] for n in entered]
    return stats


@pytest.mark.parametrize("ensemble", ENSEMBLES)
@pytest.mark.parametrize("cls_agnostic", [True, False])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_any_number_of_stages_equals_the_naive_cascade(num_stages, cls_agnostic, ensemble):
    cascade = make_cascade(num_stages=num_stages, cls_agnostic=cls_agnostic, ensemble=ensemble)
    stats = assert_equals_naive(cascade, make_scene())
    assert stats.entered == [41] * num_stages
    assert stats.left == [{}] * (num_stages - 1) + [{"completed": 41}]
    assert stats.milliseconds == {}

    cascade.exits = exits_for(num_stages)
    stats = assert_equals_naive(cascade, make_scene(num_proposals=(40, 30)))
    if num_stages > 1:
        assert set(stats.left[0]) == {"background", "confident"}
        assert stats.left[-1]["completed"] > 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "pooler",
    [
        {"kernel": "torchvision"},
        {"sampling_ratio": 2, "aligned": False},
        {"kernel": "bags", "aligned": False},
    ],
)
def test_other_poolers_and_scenes_equal_the_naive_cascade(seed, pooler):
    cascade = make_cascade(
        seed=seed,
        pooler=RoIPooler(output_size=POOLED, strides=STRIDES, **pooler),
        exits=exits_for(3),
        score_thresh=0.2,
        nms_thresh=0.3,
        detections_per_image=8,
    )
    assert_equals_naive(cascade, make_scene(seed=seed))


def test_stages_may_differ_in_size():
    cascade = make_cascade(num_stages=3, conv_dims=(5,), exits=exits_for(3))
    for stage, (conv_dims, fc_dims) in enumerate([((), (12,)), ((5,), (12,)), ((8, 5), (16, 12))]):
        cascade.box_head[stage] = ConvFCBoxHead(
            in_channels=CHANNELS, pooled_size=POOLED, conv_dims=conv_dims, fc_dims=fc_dims
        )
    assert_equals_naive(cascade, make_scene())


def test_last_boxes_runs_heads_again_on_reported_regions_only():
    cascade = make_cascade(ensemble="last_boxes", exits=exits_for(3))
    _, rows = record_calls(cascade)
    _, stats = detect(cascade, make_scene(num_proposals=(40, 30)))
    reported = [left.get("confident", 0) + left.get("completed", 0) for left in stats.left]
    computed = [sum(counts) // 2 for counts in rows]
    assert computed == [stats.entered[s] + sum(reported[s:]) for s in range(3)]


@pytest.mark.parametrize("ensemble", ENSEMBLES)
@pytest.mark.parametrize("cls_agnostic", [True, False])
def test_each_stage_equals_a_cascade_that_ends_there(ensemble, cls_agnostic):
    cascade = make_cascade(cls_agnostic=cls_agnostic, ensemble=ensemble)
    scene = make_scene()
    stages = detect_stages(cascade, scene)
    assert len(stages) == 3
    for k, stage in enumerate(stages):
        wanted, _ = detect(truncate(cascade, k + 1), scene)
        assert_same_detections(stage.detections, wanted, exact=True)
        assert all((d.exit_stages == k).all() for d in stage.detections)
    wanted, _ = detect(cascade, scene)
    assert_same_detections(stages[-1].detections, wanted, exact=True)


def test_each_stage_starts_from_the_boxes_of_the_one_before():
    cascade, scene = make_cascade(exits=exits_for(3)), make_scene()
    stages = detect_stages(cascade, scene)
    for wanted, before in zip(scene.proposals, stages[0].boxes_before, strict=True):
        assert torch.equal(before, wanted)
    for first, second in pairwise(stages):
        for after, before in zip(first.boxes_after, second.boxes_before, strict=True):
            assert torch.equal(after, before)
    assert all(len(boxes) == n for boxes, n in zip(stages[2].boxes_after, (24, 17), strict=True))


def test_timer_has_a_part_for_each_stage():
    cascade, scene = make_cascade(), make_scene()
    timer = PartTimer()
    _, stats = cascade.detect(scene.features, scene.proposals, scene.image_sizes, timer=timer)
    assert list(stats.milliseconds) == ["stage0", "stage1", "stage2", "postprocess"]
    assert min(stats.milliseconds.values()) > 0
    timer = PartTimer()
    cascade.detect_stages(scene.features, scene.proposals, scene.image_sizes, timer=timer)
    assert list(timer.milliseconds) == ["full/stage0", "full/stage1", "full/stage2"]


def test_boxes_and_scores_are_float32_under_autocast():
    cascade, scene = make_cascade(exits=exits_for(3)), make_scene()
    with torch.autocast("cpu", torch.bfloat16):
        detections, _ = detect(cascade, scene)
        [first, *_] = detect_stages(cascade, scene)
    wanted = detect_stages(cascade, scene)[0]
    assert detections[0].boxes.dtype == detections[0].scores.dtype == torch.float32
    for got, boxes in zip(first.boxes_after, wanted.boxes_after, strict=True):
        torch.testing.assert_close(got, boxes, rtol=0.02, atol=1.0)


def test_detections_have_gradients_if_enabled():
    cascade, scene = make_cascade(exits=exits_for(3)), make_scene()
    detections, _ = detect(cascade, scene)
    sum(found.scores.sum() + found.boxes.sum() for found in detections).backward()
    predictors = cascade.box_predictor
    assert all(p.cls_score.weight.grad.abs().sum() > 0 for p in predictors)
    # A box comes from the exit stage of its region alone.
    assert any(p.bbox_pred.weight.grad.abs().sum() > 0 for p in predictors)
    with torch.no_grad():
        assert not detect(cascade, scene)[0][0].scores.requires_grad
    for stage in detect_stages(cascade, scene):
        assert not stage.detections[0].scores.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ious": (0.5, 0.6)}, "3 box_heads for 2 ious"),
        ({"bbox_reg_weights": ((1.0,) * 4,)}, "1 bbox_reg_weights for 3 ious"),
        ({"stage_loss_weights": (1.0, 0.5)}, "2 stage_loss_weights for 3 ious"),
        ({"exits": exits_for(4)}, "exits of 4 stages for 3 ious"),
        ({"ensemble": "median"}, "unknown ensemble 'median'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_cascade(**changes)


def test_state_dict_has_detectron2_names():
    names = set(make_cascade(num_stages=2, conv_dims=(4,)).state_dict())
    layers = [f"box_head.{stage}.{layer}" for stage in (0, 1) for layer in ("conv1", "fc1")]
    layers += [f"box_predictor.{s}.{layer}" for s in (0, 1) for layer in ("cls_score", "bbox_pred")]
    assert names == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
