"""Masks of a cascade: of what is found, by box, class and features alone; and their losses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_masks import naive_mask, naive_mask_loss
from region_views import policy, some_policies
from small_cascades import (
    CHANNELS,
    NUM_CLASSES,
    STRIDES,
    assert_same_detections,
    detect,
    detect_stages,
    make_cascade,
    make_scene,
    naive_twin,
    objectness_of,
)
from torch import nn

from cascade_det.core import (
    ConvUpsampleMaskHead,
    Detections,
    MaskBranch,
    MaskRules,
    PartTimer,
    RoIPooler,
)
from cascade_det.core.structures import CascadeStats
from cascade_det.masks.truth import ObjectMasks

POOLED = 4
STAGES = ["last", "every"]


def mask_head(num_masks=NUM_CLASSES):
    head = ConvUpsampleMaskHead(
        in_channels=CHANNELS, conv_dims=(5,), upsampled_dim=4, num_masks=num_masks
    )
    nn.init.normal_(head.predictor.weight, std=2.0)
    return head


def with_masks(stages="last", *, rules=None, num_masks=NUM_CLASSES, **changes):
    """A small cascade whose masks differ clearly."""
    torch.manual_seed(1)
    heads = [mask_head(num_masks) for _ in range(3)]
    pooler = RoIPooler(output_size=POOLED, strides=STRIDES)
    head = heads[0] if stages == "last" else nn.ModuleList(heads)
    return make_cascade(masks=MaskBranch(head, pooler, rules or MaskRules()), **changes)


def assert_same_masks(got, wanted):
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours.masks, theirs.masks, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("num_masks", [1, NUM_CLASSES])
def test_against_one_region_at_a_time(stages, num_masks):
    exits = policy(thresholds=(0.7, 0.6), prune_thresholds=(0.1, 0.2))
    cascade, scene = with_masks(stages, num_masks=num_masks, exits=exits), make_scene()
    twin = naive_twin(cascade)
    found, stats = detect(cascade, scene)
    assert {s for image in found for s in image.exit_stages.tolist()} >= {0, 2}
    assert stats.detected == stats.masks == sum(map(len, found)) > 10
    for image, detections in enumerate(found):
        rows = zip(detections.boxes, detections.classes, detections.masks, strict=True)
        for box, label, mask in rows:
            wanted = naive_mask(twin, scene.features, image, box.tolist(), int(label), POOLED)
            torch.testing.assert_close(mask.double(), wanted, rtol=0, atol=1e-4)
    masks = torch.cat([x.masks for x in found])
    assert masks.shape[1:] == (2 * POOLED, 2 * POOLED)
    assert 0.05 < (masks > 0.5).float().mean() < 0.95


def test_a_stage_alone_has_the_masks_of_the_heads_so_far():
    cascade, scene = with_masks("every"), make_scene()
    twin = naive_twin(cascade)
    outputs = detect_stages(cascade, scene)
    assert_same_detections(outputs[2].detections, detect(cascade, scene)[0])
    assert_same_masks(outputs[2].detections, detect(cascade, scene)[0])
    for stage, output in enumerate(outputs):
        (found, _), features = output.detections, scene.features
        box, label = found.boxes[0].tolist(), int(found.classes[0])
        wanted = naive_mask(twin, features, 0, box, label, POOLED, num_stages=stage + 1)
        torch.testing.assert_close(found.masks[0].double(), wanted, rtol=0, atol=1e-4)


def test_a_stage_alone_has_no_masks_where_only_the_last_has_a_head():
    outputs = detect_stages(with_masks("last"), make_scene())
    assert all(found.masks is None for output in outputs for found in output.detections)


@given(arguments=some_policies(), stages=st.sampled_from(STAGES), seed=st.integers(0, 20))
@settings(max_examples=20)
def test_a_mask_does_not_depend_on_who_else_left(arguments, stages, seed):
    """The mask of each detection is that of its box and class alone."""
    cascade, scene = with_masks(stages, exits=policy(**arguments)), make_scene(seed=seed)
    found, _ = detect(cascade, scene)
    pyramid = cascade.pooler.prepare(scene.features)
    for image, detections in enumerate(found):
        for row in torch.randperm(len(detections))[:3].tolist():
            one = detections[row : row + 1]
            alone = cascade.masks.probabilities(
                pyramid, one.boxes, torch.tensor([image]), one.classes
            )
            torch.testing.assert_close(one.masks, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stages", STAGES)
def test_a_batch_is_its_images_one_by_one(stages):
    exits = policy(thresholds=(0.7, 0.6), prune_thresholds=(0.1, 0.2))
    cascade, scene = with_masks(stages, exits=exits), make_scene()
    found, stats = detect(cascade, scene)
    objectness, made = objectness_of(scene), 0
    for image in range(2):
        (alone,), own = cascade.detect(
            [level[image : image + 1] for level in scene.features],
            [scene.proposals[image]],
            [scene.image_sizes[image]],
            objectness=[objectness[image]],
        )
        assert_same_detections([alone], [found[image]])
        assert_same_masks([alone], [found[image]])
        made += own.masks
    assert made == stats.masks


@given(seed=st.integers(0, 1000), stages=st.sampled_from(STAGES))
@settings(max_examples=15)
def test_the_order_of_proposals_changes_no_mask(seed, stages):
    exits = policy(thresholds=(0.7, 0.6), prune_thresholds=(0.1, 0.2), redundancy_iou=0.9)
    cascade, scene = with_masks(stages, exits=exits), make_scene()
    objectness = objectness_of(scene)
    wanted, _ = detect(cascade, scene, objectness)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(p), generator=generator) for p in scene.proposals]
    scene.proposals = [p[order] for p, order in zip(scene.proposals, orders, strict=True)]
    shuffled = [x[order] for x, order in zip(objectness, orders, strict=True)]
    found, _ = detect(cascade, scene, shuffled)
    assert_same_detections(found, wanted)
    assert_same_masks(found, wanted)


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize(
    "rules", [MaskRules(), MaskRules(score_threshold=0.5), MaskRules(redundancy_iou=0.3)]
)
def test_only_chosen_detections_are_pooled_and_computed(stages, rules):
    cascade, scene = with_masks(stages, rules=rules), make_scene()
    pooled, rows = [], []
    cascade.masks.pooler.register_forward_hook(lambda _, x, y: pooled.append(x[1]))
    for head in cascade.masks.heads:
        head.register_forward_hook(lambda _, x, y: rows.append((len(x[0]), len(y))))
    timer = PartTimer()
    found, stats = cascade.detect(scene.features, scene.proposals, scene.image_sizes, timer=timer)
    chosen = torch.cat([rules.chosen(x) for x in found])
    made = torch.cat([x.masks.flatten(1).any(dim=1) for x in found])
    assert made.tolist() == chosen.tolist()
    assert (stats.detected, stats.masks) == (len(chosen), int(chosen.sum()))
    assert chosen.all() == (rules == MaskRules())
    assert len(pooled) == 1
    assert torch.equal(pooled[0], torch.cat([x.boxes for x in found])[chosen])
    assert rows == [(stats.masks, stats.masks)] * (1 if stages == "last" else 3)
    assert timer.milliseconds["masks"] > 0
    # What others get does not change a mask.
    every, _ = with_masks(stages).detect(scene.features, scene.proposals, scene.image_sizes)
    for ours, theirs in zip(found, every, strict=True):
        kept = rules.chosen(theirs)
        torch.testing.assert_close(ours.masks[kept], theirs.masks[kept], rtol=0, atol=1e-6)


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("num_proposals", [(0, 0), (5, 0)])
def test_images_without_detections(stages, num_proposals):
    cascade, scene = with_masks(stages), make_scene(num_proposals=num_proposals)
    found, stats = detect(cascade, scene)
    for detections in found:
        assert detections.masks.shape == (len(detections), 2 * POOLED, 2 * POOLED)
    assert len(found[1]) == 0
    assert stats.masks == len(found[0])
    if num_proposals == (0, 0):
        assert stats == CascadeStats([0] * 3, stats.left)


def bitmaps(scene, *, unknown=()):
    """A random blob for each object; none for those numbered in ``unknown``."""
    masks, number = [], 0
    for boxes, (height, width) in zip(scene.gt_boxes, scene.image_sizes, strict=True):
        own = []
        for box in boxes.round().long().tolist():
            mask = torch.zeros(height, width, dtype=torch.bool)
            left, top, right, bottom = box
            mask[top:bottom, left : (left + right) // 2] = True
            mask[(top + bottom) // 2 : bottom, left:right] = True
            own.append(None if number in unknown else mask)
            number += 1
        masks.append(own)
    return masks


def losses(cascade, scene, masks):
    flat = ObjectMasks([mask for own in masks for mask in own])
    torch.manual_seed(0)
    return cascade.losses(scene.features, scene.proposals, *scene.targets, scene.image_sizes, flat)


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("unknown", [(), (0, 5)])
def test_losses_by_hand(stages, unknown):
    weights = (1.0, 0.5, 0.25)
    cascade, scene = with_masks(stages, stage_loss_weights=weights), make_scene()
    masks = bitmaps(scene, unknown=unknown)
    crops, calls = [], []
    cascade.masks.pooler.register_forward_hook(lambda _, x, y: crops.append(x[1:]))
    for head in cascade.masks.heads:
        head.register_forward_hook(lambda _, x, y: calls.append((x[1], y.detach().double())))
    found = {name: value for name, value in losses(cascade, scene, masks).items() if "mask" in name}
    names = ["loss_mask"] if stages == "last" else [f"loss_mask_stage{s}" for s in range(3)]
    assert list(found) == names
    objects = [boxes.tolist() for boxes in scene.gt_boxes]
    for name, (boxes, images), (classes, logits), weight in zip(
        names, crops, calls, weights, strict=False
    ):
        regions = list(zip(images.tolist(), boxes.tolist(), logits, strict=True))
        assert len(regions) >= 3
        wanted = naive_mask_loss(regions, objects, masks)
        if stages == "every":
            wanted *= weight
        assert found[name].item() == pytest.approx(wanted, rel=1e-4)
        assert classes.max() < NUM_CLASSES
    # Each stage trains on its own boxes.
    assert len({boxes.sum().item() for boxes, _ in crops}) == len(names)


def test_the_foreground_of_stage_0_trains_the_last_head():
    """And of every stage, with masks, each its own: as many as that stage's box loss has."""
    scene = make_scene()
    counted = {}
    for stages in STAGES:
        cascade, rows = with_masks(stages), []
        for head in cascade.masks.heads:
            head.register_forward_hook(lambda _, x, y, rows=rows: rows.append(len(x[0])))
        losses(cascade, scene, bitmaps(scene))
        counted[stages] = rows
        per_image = [
            cascade.metrics[f"stage{s}/roi_head/num_fg_samples"].item() * 2 for s in range(3)
        ]
        assert rows == [round(n) for n in per_image[: len(rows)]]
    assert counted["last"] == counted["every"][:1]


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("kind", ["no foreground", "no objects", "all unknown"])
def test_without_anything_to_train_on_the_loss_is_0_with_a_graph(stages, kind):
    scene = make_scene(num_objects=(0, 0) if kind == "no objects" else (4, 3))
    changes = {}
    if kind == "no foreground":
        changes = {"proposal_append_gt": False, "ious": (0.999, 0.9991, 0.9992)}
    cascade = with_masks(stages, **changes)
    masks = bitmaps(scene, unknown=range(7) if kind == "all unknown" else ())
    found = losses(cascade, scene, masks)
    own = [value for name, value in found.items() if "mask" in name]
    assert len(own) == (1 if stages == "last" else 3)
    assert all(value.item() == 0 for value in own)
    sum(found.values()).backward()
    for name, parameter in cascade.mask_head.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("stages", STAGES)
def test_masks_change_no_box_and_no_box_loss(stages):
    scene = make_scene()
    plain, masked = make_cascade(), with_masks(stages)
    masked.load_state_dict(plain.state_dict(), strict=False)
    found, wanted = detect(masked, scene)[0], detect(plain, scene)[0]
    assert_same_detections(found, wanted, exact=True)
    ours = losses(masked, scene, bitmaps(scene))
    torch.manual_seed(0)
    theirs = plain.losses(scene.features, scene.proposals, *scene.targets, scene.image_sizes)
    assert {name: value for name, value in ours.items() if "mask" not in name} == theirs


def test_a_detection_keeps_its_mask_when_selected_and_moved():
    found, _ = detect(with_masks(), make_scene())
    order = torch.arange(len(found[0])).flip(0)
    assert torch.equal(found[0][order].masks, found[0].masks.flip(0))
    assert isinstance(found[0].to("cpu"), Detections)
    assert torch.equal(found[0].to("cpu").masks, found[0].masks)
