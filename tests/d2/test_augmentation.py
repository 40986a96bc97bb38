"""Test-time augmentation of the standalone host against the real Detectron2's.

``pytest --junitxml`` records the largest differences.
"""

import copy

import pytest
import torch

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.modeling import GeneralizedRCNNWithTTA
from two_hosts import (
    BACKBONES,
    EVERY,
    EXITS,
    MASKS,
    SAME_KERNEL,
    build_three,
    build_two,
    make_batch,
)

from cascade_det.config import augmentation_arguments
from cascade_det.standalone import optimize
from cascade_det.standalone.augmented import AugmentedDetector

pytestmark = pytest.mark.needs_detectron2

# The last one is limited by MAX_SIZE.
AUGMENTED = (
    "TEST.AUG.ENABLED",
    True,
    "TEST.AUG.MIN_SIZES",
    (64, 80, 112),
    "TEST.AUG.MAX_SIZE",
    128,
)


class Theirs(GeneralizedRCNNWithTTA):
    """Keeps the averaged masks, which it pastes; ``[D, 1, M, M]`` for each image."""

    def __init__(self, cfg, model):
        super().__init__(cfg, model.eval())
        self.averages = []

    def _reduce_pred_masks(self, outputs, tfms):
        self.averages.append(super()._reduce_pred_masks(outputs, tfms))
        return self.averages[-1]


def build(*options, own_heads=False):
    """Detectron2's, with its own heads or with ours, and the standalone detector."""
    theirs, *_, alone = (build_three if own_heads else build_two)(*options)
    return Theirs(theirs.cfg, theirs.model), alone


def augmented(host):
    return AugmentedDetector(host.model, **augmentation_arguments(host.cfg))


@torch.no_grad()
def outputs(theirs, batch):
    return [out["instances"] for out in theirs([dict(sample) for sample in batch])]


@pytest.mark.parametrize(
    ("masks", "exits"),
    [((), ()), ((), EXITS), (MASKS, ()), (MASKS, EXITS), (EVERY, EXITS)],
    ids=["boxes", "boxes-exits", "masks", "masks-exits", "masks-of-every-stage"],
)
def test_same_numbers(masks, exits, record_property):
    options = (*BACKBONES["R-18"], *SAME_KERNEL, *AUGMENTED, *masks, *exits)
    theirs, alone = build(*options, own_heads=not exits)
    batch = make_batch(2)
    wanted, got = outputs(theirs, batch), augmented(alone).detect(batch).detections
    stages = torch.cat([found.exit_stages for found in got])
    assert (len(stages.unique()) > 1) == bool(exits)
    largest = 0.0
    for index, (ours, own) in enumerate(zip(got, wanted, strict=True)):
        assert len(ours) > 20
        assert torch.equal(ours.classes, own.pred_classes)
        assert torch.equal(ours.boxes, own.pred_boxes.tensor)
        assert torch.equal(ours.scores, own.scores)
        if not masks:
            assert ours.masks is None
            continue
        average = theirs.averages[index][:, 0]
        largest = max(largest, (ours.masks - average).abs().max().item())
        assert average.std() > 0.1
        size = (batch[index]["height"], batch[index]["width"])
        differ = ours.paste(*size) != own.pred_masks
        assert differ.sum() <= 1e-5 * differ.numel()
    record_property("largest", largest)
    assert largest <= 1e-5


@pytest.fixture(scope="module")
def two():
    return build(*BACKBONES["R-18"], *SAME_KERNEL, *AUGMENTED, *MASKS)


@pytest.mark.parametrize(
    "options", [("TEST.AUG.FLIP", False), ("TEST.AUG.MIN_SIZES", (0, 72))], ids=["flip", "sizes"]
)
def test_a_key_means_the_same(two, options):
    """Of an image that was not resized before; the others were."""
    theirs, alone = two
    cfg = theirs.cfg.clone()
    cfg.merge_from_list(list(options))
    (sample,) = make_batch(1)
    sample["height"], sample["width"] = sample["image"].shape[1:]
    theirs = Theirs(cfg, theirs.model)
    (wanted,) = outputs(theirs, [sample])
    views = augmentation_arguments(cfg)
    (ours,) = AugmentedDetector(alone.model, **views).detect([sample]).detections
    assert torch.equal(ours.boxes, wanted.pred_boxes.tensor)
    torch.testing.assert_close(ours.masks, theirs.averages[0][:, 0], rtol=0, atol=1e-5)


def test_a_fast_detector_finds_the_same(two):
    """Up to rounding, which may decide what NMS drops."""
    theirs, alone = two
    batch = make_batch(1)
    theirs.averages.clear()
    (wanted,) = outputs(theirs, batch)
    (average,) = theirs.averages
    fast = optimize(copy.deepcopy(alone.model), dtype="float32")
    for pooler in (fast.roi_heads.pooler, fast.roi_heads.masks.pooler):
        pooler.kernel = "bags"
    views = augmentation_arguments(alone.cfg)
    (ours,) = AugmentedDetector(fast, **views).detect(batch).detections
    apart = (ours.boxes[:, None] - wanted.pred_boxes.tensor).abs().amax(dim=2)
    apart[ours.classes[:, None] != wanted.pred_classes] = torch.inf
    distance, nearest = apart.min(dim=1)
    same = distance <= 0.01
    assert len(ours) == len(wanted) > 20
    assert same.float().mean() >= 0.95
    nearest = nearest[same]
    assert len(nearest.unique()) == len(nearest)
    torch.testing.assert_close(ours.scores[same], wanted.scores[nearest], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.masks[same], average[nearest, 0], rtol=0, atol=1e-3)
