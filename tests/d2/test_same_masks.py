"""The same masks of one model and image in Detectron2, our heads in it, and standalone.

``pytest --junitxml`` records the largest differences.
"""

import pytest
import torch

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.layers.mask_ops import _do_paste_mask
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

pytestmark = pytest.mark.needs_detectron2

R18 = BACKBONES["R-18"]
OPTIONS = {
    "plain": (),
    "agnostic": ("MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True),
    "GN": ("MODEL.ROI_MASK_HEAD.NORM", "GN"),
    "BN": ("MODEL.ROI_MASK_HEAD.NORM", "BN"),
    "sampled": (
        *("MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO", 2),
        *("MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ROIAlign", "MODEL.ROI_MASK_HEAD.NUM_CONV", 0),
    ),
}


def all_masks(detections):
    return torch.cat([found.masks for found in detections])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_before_the_threshold(options, record_property):
    own, ours, alone = build_three(*R18, *MASKS, *SAME_KERNEL, *options)
    wanted = own.detect_resized(make_batch(3))
    assert all(len(found) > 20 for found in wanted)
    # Neither all alike nor all decided.
    assert 0.05 < (all_masks(wanted) > 0.5).float().mean() < 0.95
    found = ours.detect_resized(make_batch(3))
    assert torch.equal(all_masks(found), all_masks(wanted))
    found = alone.detect_resized(make_batch(3))
    largest = (all_masks(found) - all_masks(wanted)).abs().max().item()
    record_property("standalone", largest)
    assert largest <= 1e-5


def pasted_values(found, height, width):
    """What Detectron2 compares with 0.5: ``[D, height, width]``."""
    values = torch.zeros(len(found), height, width)
    for value, mask, box in zip(values, found.masks, found.boxes, strict=True):
        part, place = _do_paste_mask(mask[None, None], box[None], height, width)
        value[place] = part[0]
    return values


def test_pasted(record_property):
    own, ours, alone = build_three(*R18, *MASKS, *SAME_KERNEL)
    batch = make_batch(3)
    with torch.no_grad():
        wanted, in_plugin = (
            [output["instances"] for output in host.model.eval()(batch)] for host in (own, ours)
        )
    differing = total = 0
    images = zip(batch, wanted, in_plugin, alone.detect(batch), strict=True)
    for sample, theirs, plugin, found in images:
        assert torch.equal(plugin.pred_masks, theirs.pred_masks)
        size = sample["height"], sample["width"]
        pasted = found.paste(*size)
        assert pasted.flatten(1).any(dim=1).float().mean() > 0.9
        decided = (pasted_values(found, *size) - 0.5).abs() > 1e-4
        assert torch.equal(pasted[decided], theirs.pred_masks[decided])
        differing += int((pasted != theirs.pred_masks).sum())
        total += pasted.numel()
    record_property("differing pixels", differing / total)


@pytest.mark.parametrize("stages", [MASKS, EVERY], ids=["last", "every"])
def test_fast_pooling_gives_the_same_masks_of_the_same_boxes(stages, record_property):
    ours, alone = build_two(*R18, *stages, *SAME_KERNEL)
    inputs = alone.model.eval().cascade_inputs(make_batch(2))
    wanted, _ = alone.cascade.detect(**vars(inputs))
    kernels = {}
    for name, host in (("plugin", ours), ("standalone", alone)):
        host.model.eval()
        cascade = host.cascade
        if name == "plugin":
            host.model.roi_heads.follow_predictors()
        cascade.pooler.kernel = "bags"
        with torch.no_grad():
            (found, made) = cascade.masks.add(wanted, cascade.pooler.prepare(inputs.features))
        assert made == sum(map(len, wanted))
        kernels[name] = (all_masks(found) - all_masks(wanted)).abs().max().item()
    record_property("largest", kernels)
    assert max(kernels.values()) <= 1e-5


@pytest.mark.parametrize(
    "options",
    [(), OPTIONS["agnostic"], OPTIONS["GN"], EXITS],
    ids=["plain", "agnostic", "GN", "exits"],
)
def test_masks_of_every_stage(options):
    ours, alone = build_two(*R18, *EVERY, *SAME_KERNEL, *options)
    wanted, found = (host.detect_resized(make_batch(2)) for host in (ours, alone))
    assert all(len(x) > 10 for x in wanted)
    assert 0.05 < (all_masks(wanted) > 0.5).float().mean() < 0.95
    assert (all_masks(found) - all_masks(wanted)).abs().max() <= 1e-5
    # The heads of the stages differ.
    head = alone.cascade.masks
    inputs = alone.model.cascade_inputs(make_batch(2))
    with torch.no_grad():
        first, _ = head.add(found, alone.cascade.pooler.prepare(inputs.features), stages=1)
    assert (all_masks(first) - all_masks(found)).abs().max() > 0.1


@pytest.mark.parametrize("stages", [MASKS, EVERY], ids=["last", "every"])
def test_rules_mean_the_same_in_both_hosts(stages):
    rules = ("MODEL.CASCADE.MASK.SCORE_THRESHOLD", 0.2, "MODEL.CASCADE.MASK.REDUNDANCY", 0.6)
    ours, alone = build_two(*R18, *stages, *rules, *SAME_KERNEL)
    wanted, found = (host.detect_resized(make_batch(2)) for host in (ours, alone))
    made = all_masks(wanted).flatten(1).any(dim=1)
    assert 0 < made.sum() < len(made)
    scores = torch.cat([x.scores for x in wanted])
    assert not made[scores < 0.2].any()
    assert not made[scores >= 0.2].all()
    assert torch.equal(all_masks(found).flatten(1).any(dim=1), made)
    assert (all_masks(found) - all_masks(wanted)).abs().max() <= 1e-5
    # What has no mask pastes to nothing.
    with torch.no_grad():
        pasted = [output["instances"] for output in ours.model(make_batch(2))]
    assert len(made) == sum(map(len, pasted))
    assert not torch.cat([x.pred_masks.flatten(1).any(dim=1) for x in pasted])[~made].any()
