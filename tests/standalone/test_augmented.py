"""Test-time augmentation: laws that hold for any weights; ``tests/d2`` has Detectron2's numbers."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from small_cascades import CHANNELS, NUM_CLASSES, STRIDES
from small_detectors import make_detector, random_image
from torch import nn
from torchvision.ops import box_iou

from cascade_det.core import ConvUpsampleMaskHead, MaskBranch, MaskRules, PartTimer, RoIPooler
from cascade_det.standalone.augmented import AugmentedDetector

SIZES = {"min_sizes": (48, 72, 96), "max_size": 160}
EXACT = {"rtol": 0, "atol": 0}


def make_masks(**rules):
    """Masks of a head whose answers depend on the class and on the place in the box."""
    head = ConvUpsampleMaskHead(
        in_channels=CHANNELS, conv_dims=(8,), upsampled_dim=8, num_masks=NUM_CLASSES
    )
    nn.init.normal_(head.predictor.weight, std=4.0)
    return MaskBranch(head, RoIPooler(output_size=7, strides=STRIDES), MaskRules(**rules))


def with_rules(detector, **rules):
    changed = copy.deepcopy(detector)
    changed.roi_heads.masks = replace(changed.roi_heads.masks, rules=MaskRules(**rules))
    return changed


@pytest.fixture(scope="module")
def detector():
    return make_detector(masks=make_masks())


@pytest.fixture
def batch():
    sizes = ((80, 120), (90, 70))
    return [
        {"image": random_image(*size, seed=seed), "height": 2 * size[0], "width": 3 * size[1]}
        for seed, size in enumerate(sizes)
    ]


def assert_close(got, wanted, *, boxes=EXACT, scores=EXACT):
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.classes.tolist() == theirs.classes.tolist()
        assert ours.exit_stages.tolist() == theirs.exit_stages.tolist()
        torch.testing.assert_close(ours.scores, theirs.scores, **scores)
        torch.testing.assert_close(ours.boxes, theirs.boxes, **boxes)
        torch.testing.assert_close(ours.masks, theirs.masks, **scores)


def test_one_view_of_the_same_size_is_plain_detection(detector, batch):
    view = AugmentedDetector(detector, min_sizes=(0,), max_size=1, flip=False)
    for sample in batch:
        image = [{"image": sample["image"]}]
        got, wanted = (d.detect(image).detections for d in (view, detector))
        assert len(wanted[0]) > 5
        assert_close(got, wanted)
        assert got[0].masks.std() > 0.05


@pytest.mark.parametrize("suppression", ["nms", "soft_linear", "soft_gaussian", "wbf"])
def test_the_mirror_image_of_an_image_has_mirrored_detections(detector, batch, suppression):
    detector = copy.deepcopy(detector)
    detector.roi_heads.selection.suppression = suppression
    augmented = AugmentedDetector(detector, min_sizes=(48,), max_size=160, flip=True)
    mirror = [{**sample, "image": sample["image"].flip(2)} for sample in batch]
    got, wanted = (augmented.detect(images).detections for images in (mirror, batch))
    for found, sample in zip(wanted, batch, strict=True):
        x0, y0, x1, y1 = found.boxes.unbind(dim=1)
        width = sample["width"]
        found.boxes = torch.stack((width - x1, y0, width - x0, y1), dim=1)
        found.masks = found.masks.flip(2)
    assert_close(got, wanted, boxes={"rtol": 0, "atol": 1e-3}, scores={"rtol": 0, "atol": 1e-5})


def test_views_see_more_than_the_image_alone(detector, batch):
    """What is found lies in the original, and no two of a class overlap more than NMS lets them."""
    alone = detector.detect(batch).detections
    for found, sample, few in zip(
        AugmentedDetector(detector, **SIZES, flip=True).detect(batch).detections,
        batch,
        alone,
        strict=True,
    ):
        assert len(found) > len(few)
        assert (found.scores.diff() <= 0).all()
        assert (found.boxes >= 0).all()
        assert (
            found.boxes <= found.boxes.new_tensor([sample["width"], sample["height"]] * 2)
        ).all()
        same_class = found.classes[:, None] == found.classes
        overlaps = box_iou(found.boxes, found.boxes).fill_diagonal_(0)
        assert overlaps[same_class].max() <= detector.roi_heads.selection.nms_thresh + 1e-6


def test_a_batch_is_its_images_one_by_one(detector, batch):
    augmented = AugmentedDetector(detector, **SIZES, flip=True)
    one_by_one = [augmented.detect([sample]).detections[0] for sample in batch]
    assert_close(augmented.detect(batch).detections, one_by_one)
    assert augmented.detect([]).detections == []


def test_the_backbone_runs_once_for_each_view(detector, batch):
    seen, masks = [], []
    hooks = [
        detector.backbone.register_forward_hook(lambda _, images, __: seen.append(len(images[0]))),
        detector.roi_heads.mask_head.register_forward_hook(
            lambda _, inputs, __: masks.append(len(inputs[0]))
        ),
    ]
    timer = PartTimer()
    output = AugmentedDetector(detector, min_sizes=(48, 72), max_size=160, flip=True).detect(
        batch[:1], timer=timer
    )
    for hook in hooks:
        hook.remove()
    assert seen == [3, 1]
    assert masks == [3 * len(output.detections[0]), len(output.detections[0])]
    assert output.stats.masks == output.stats.detected == len(output.detections[0])
    assert list(timer.milliseconds) == ["boxes", "masks"]


@pytest.mark.parametrize(
    "rules",
    [{"score_threshold": 0.6}, {"redundancy_iou": 0.3}],
    ids=lambda rules: next(iter(rules)),
)
def test_rules_leave_masks_out_of_all_views(detector, batch, rules):
    every, some = (
        AugmentedDetector(one, **SIZES, flip=True).detect(batch)
        for one in (detector, with_rules(detector, **rules))
    )
    total = 0
    for found, wanted in zip(some.detections, every.detections, strict=True):
        chosen = MaskRules(**rules).chosen(wanted)
        assert 0 < chosen.sum() < len(chosen)
        total += int(chosen.sum())
        assert torch.equal(found.boxes, wanted.boxes)
        torch.testing.assert_close(found.masks[chosen], wanted.masks[chosen], rtol=0, atol=1e-6)
        assert not found.masks[~chosen].any()
    assert (some.stats.masks, some.stats.detected) == (total, every.stats.detected)


@pytest.mark.parametrize("suppression", ["nms", "soft_linear", "soft_gaussian", "wbf"])
def test_scores_are_above_the_threshold_after_the_views_are_merged(detector, batch, suppression):
    detector = copy.deepcopy(detector)
    selection = detector.roi_heads.selection
    selection.score_thresh = detector.detect(batch).detections[0].scores.median().item()
    selection.suppression = suppression
    augmented = AugmentedDetector(detector, **SIZES, flip=True)
    for found in augmented.detect(batch).detections:
        assert (found.scores > selection.score_thresh).all()


def test_nothing_found(batch):
    blind = make_detector(masks=make_masks(), score_thresh=1.0)
    found = AugmentedDetector(blind, **SIZES, flip=True).detect(batch).detections
    assert [d.masks.shape for d in found] == [(0, 14, 14)] * 2


def test_modes_of_modules_are_restored(batch):
    detector = make_detector(masks=make_masks())
    detector.train()
    detector.backbone.bottom_up.eval()
    modes = [module.training for module in detector.modules()]
    AugmentedDetector(detector, **SIZES, flip=True).detect(batch)
    assert [module.training for module in detector.modules()] == modes


def test_single_stages_are_refused(detector, batch):
    augmented = AugmentedDetector(detector, **SIZES, flip=True)
    for stages in (True, [False, True]):
        with pytest.raises(ValueError, match="single stages"):
            augmented.detect(batch, stages=stages)
