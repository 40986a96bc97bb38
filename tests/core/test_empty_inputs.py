"""Images without proposals or objects: forward and backward."""

import pytest
import torch
from small_cascades import POOLED, STRIDES, make_cascade, make_scene

from cascade_det.core import RoIPooler
from cascade_det.core.ensemble import ENSEMBLES
from cascade_det.core.losses import BOX_LOSSES
from cascade_det.core.region_gates import RegionGates
from cascade_det.core.training_schedule import TrainingSchedule

# Proposals and objects of two images.
COUNTS = {
    "no proposals": ((0, 0), (3, 2)),
    "no proposals in one image": ((9, 0), (3, 2)),
    "no objects": ((9, 8), (0, 0)),
    "no objects in one image": ((9, 8), (0, 2)),
    "an empty image": ((9, 0), (3, 0)),
    "nothing": ((0, 0), (0, 0)),
}


def cascade_and_scene(counts, *, kernel="bags", **changes):
    num_proposals, num_objects = COUNTS[counts]
    pooler = RoIPooler(output_size=POOLED, strides=STRIDES, kernel=kernel)
    cascade = make_cascade(pooler=pooler, conv_dims=(4,), **changes)
    return cascade, make_scene(num_proposals=num_proposals, num_objects=num_objects)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("kernel", ["bags", "torchvision"])
@pytest.mark.parametrize("append", [True, False])
@pytest.mark.parametrize("cls_agnostic", [True, False])
def test_every_parameter_gets_a_finite_gradient(counts, kernel, append, cls_agnostic):
    cascade, scene = cascade_and_scene(
        counts, kernel=kernel, proposal_append_gt=append, cls_agnostic=cls_agnostic
    )
    features = [level.requires_grad_() for level in scene.features]
    losses = cascade.losses(features, scene.proposals, *scene.targets, scene.image_sizes)
    assert len(losses) == 6
    assert all(bool(value.isfinite()) and value.shape == () for value in losses.values())
    sum(losses.values()).backward()
    for tensor in (*cascade.parameters(), *features):
        assert tensor.grad is not None
        assert bool(tensor.grad.isfinite().all())
    has_objects = any(COUNTS[counts][1])
    if not has_objects:
        assert all(losses[f"loss_box_reg_stage{stage}"] == 0 for stage in range(3))
    if counts == "nothing":
        assert all(value == 0 for value in losses.values())


@pytest.mark.parametrize("loss_type", BOX_LOSSES)
@pytest.mark.parametrize("counts", ["no objects", "nothing"])
def test_every_box_loss_is_zero_without_foreground(loss_type, counts):
    cascade, scene = cascade_and_scene(counts, box_reg_loss_type=loss_type)
    losses = cascade.losses(scene.features, scene.proposals, *scene.targets, scene.image_sizes)
    sum(losses.values()).backward()
    assert losses["loss_box_reg_stage0"] == 0
    for predictor in cascade.box_predictor:
        assert torch.equal(
            predictor.bbox_pred.weight.grad, torch.zeros_like(predictor.bbox_pred.weight)
        )


def test_a_stage_that_loses_all_its_regions():
    cascade, scene = cascade_and_scene("no objects")
    with torch.no_grad():
        # Far to the right, out of the image: nothing is left for stages 1 and 2.
        cascade.box_predictor[0].bbox_pred.bias.copy_(torch.tensor([1e4, 0, 0, 0]))
    losses = cascade.losses(scene.features, scene.proposals, *scene.targets, scene.image_sizes)
    sum(losses.values()).backward()
    assert losses["loss_cls_stage0"] > 0
    assert losses["loss_cls_stage1"] == losses["loss_cls_stage2"] == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in cascade.parameters())


def test_gates_and_the_prefix_loss_are_zero_without_regions():
    gates = RegionGates("hard", threshold=0.5, scale=15)
    schedule = TrainingSchedule(num_stages=3, gates=gates, prefix_loss_weight=1.0)
    cascade, scene = cascade_and_scene("nothing", regime=schedule)
    losses = cascade.losses(scene.features, scene.proposals, *scene.targets, scene.image_sizes)
    assert len(losses) == 7
    assert all(loss.item() == 0 for loss in losses.values())
    sum(losses.values()).backward()


@pytest.mark.parametrize("ensemble", ENSEMBLES)
@pytest.mark.parametrize("counts", ["no proposals", "no proposals in one image"])
def test_detecting(ensemble, counts):
    """Without exits; for those with every rule see test_stage_runner.py."""
    cascade, scene = cascade_and_scene(counts, ensemble=ensemble, score_thresh=0.0)
    detections, stats = cascade.detect(scene.features, scene.proposals, scene.image_sizes)
    num_proposals = COUNTS[counts][0]
    assert [len(d) > 0 for d in detections] == [n > 0 for n in num_proposals]
    assert stats.entered[0] == sum(num_proposals)
    empty = detections[1]
    assert empty.boxes.shape == (0, 4)
    assert empty.scores.shape == empty.classes.shape == empty.exit_stages.shape == (0,)
    assert empty.classes.dtype == empty.exit_stages.dtype == torch.int64
    stages = cascade.detect_stages(scene.features, scene.proposals, scene.image_sizes)
    for stage in stages:
        assert [len(boxes) for boxes in stage.boxes_after] == list(num_proposals)
        assert len(stage.detections[1]) == 0
