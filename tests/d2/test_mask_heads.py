"""Masks of our heads in Detectron2: who makes them, from what, and what a detector reports."""

import copy

import pytest
import torch

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_MASK_HEAD_REGISTRY, GeneralizedRCNNWithTTA
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead, MaskRCNNConvUpsampleHead
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from small_cascades import CHANNELS, NUM_CLASSES, STRIDES, make_scene
from small_plugin import (
    EXITS,
    MASKS,
    NAMES,
    SAME_KERNEL,
    assert_same_instances,
    build_detector,
    build_heads,
    decided,
    detect,
    features_of,
    heads_cfg,
    make_image,
    model_cfg,
    plain_arguments,
    proposals_of,
    targets_of,
)

from cascade_det.core import ConvUpsampleMaskHead, MaskRules, PartTimer
from cascade_det.d2 import EarlyExitCascadeROIHeads
from cascade_det.d2.detector import Detector
from cascade_det.d2.heads_call import HeadsCall
from cascade_det.d2.mask_heads import StageMaskHeads
from cascade_det.d2.structures import InstanceMasks, number_objects, to_labelled_regions
from cascade_det.errors import ConfigError
from cascade_det.masks.truth import ObjectMasks

pytestmark = pytest.mark.needs_detectron2

EVERY = [*MASKS, "MODEL.CASCADE.MASK.STAGES", "every"]
RULES = ["MODEL.CASCADE.MASK.SCORE_THRESHOLD", 0.5]
INPUTS = [{"image": make_image((96, 128)), "height": 150, "width": 200}]


def stir_masks(model):
    for name, parameter in model.named_parameters():
        if "mask_head" in name and "predictor.weight" in name:
            torch.nn.init.normal_(parameter, std=3.0)
    return model


def mask_parts(head, pooler="ROIAlignV2", **changes):
    """Arguments of the heads."""
    scales = [1 / stride for stride in STRIDES]
    return {
        "mask_in_features": NAMES,
        "mask_pooler": ROIPooler(14, scales, 0, pooler) if pooler else None,
        "mask_head": head,
    } | changes


def their_head(kind=MaskRCNNConvUpsampleHead):
    shape = ShapeSpec(channels=CHANNELS, height=14, width=14)
    return kind(shape, num_classes=NUM_CLASSES, conv_dims=[8, 8])


def our_heads(count=3):
    return StageMaskHeads(
        [
            ConvUpsampleMaskHead(
                in_channels=CHANNELS, conv_dims=(8,), upsampled_dim=8, num_masks=NUM_CLASSES
            )
            for _ in range(count)
        ]
    )


def heads_with(head, kind=EarlyExitCascadeROIHeads, **changes):
    torch.manual_seed(0)
    parts = mask_parts(head, **{k: changes.pop(k) for k in ("pooler",) if k in changes})
    return stir_masks(decided(kind(**plain_arguments(**parts | changes)))).eval()


class Inverted(MaskRCNNConvUpsampleHead):
    """A head that the cascade cannot run by ``layers``."""

    def forward(self, x, instances):
        result = super().forward(x, instances)
        if not self.training:
            for own in result:
                own.pred_masks = 1 - own.pred_masks
        return result


class TestWhoMakesTheMasks:
    def test_the_cascade_for_heads_that_it_can_run(self):
        for head in (their_head(), our_heads()):
            heads = heads_with(head)
            with HeadsCall().within() as call:
                found = detect(heads, make_scene())
            assert call.masked is found
            assert call.stats.masks == call.stats.detected == sum(map(len, found)) > 5

    @pytest.mark.parametrize("kind", ["forward", "pooler", "maps"])
    def test_detectron2_for_others(self, kind):
        changes = {"forward": {}, "pooler": {"pooler": "ROIPool"}, "maps": {}}[kind]
        if kind == "maps":
            changes = {"mask_in_features": NAMES[:1]}
        head = their_head(Inverted if kind == "forward" else MaskRCNNConvUpsampleHead)
        heads = heads_with(head, **changes)
        if kind == "maps":
            heads.mask_pooler = ROIPooler(14, [1 / STRIDES[0]], 0, "ROIAlignV2")
        scene = make_scene()
        with HeadsCall(PartTimer()).within() as call:
            found = detect(heads, scene)
        assert call.masked is None
        assert call.stats.masks == call.stats.detected == sum(map(len, found)) > 5
        assert call.timer.milliseconds["masks"] > 0
        if kind == "forward":
            plain = heads_with(their_head())
            plain.load_state_dict(heads.state_dict())
            wanted = detect(plain, scene)
            for ours, theirs in zip(found, wanted, strict=True):
                torch.testing.assert_close(ours.pred_masks, 1 - theirs.pred_masks)

    def test_rules_need_a_head_that_the_cascade_can_run(self):
        rules = MaskRules(score_threshold=0.5)
        with pytest.raises(ValueError, match=r"MASK\.SCORE_THRESHOLD .* runs Inverted"):
            heads_with(their_head(Inverted), mask_rules=rules)
        with pytest.raises(ValueError, match="MaskRCNNConvUpsampleHead and heads like it"):
            heads_with(their_head(), mask_rules=rules, pooler="ROIPool")

    def test_an_overridden_method_makes_the_masks(self):
        class Own(EarlyExitCascadeROIHeads):
            def _forward_mask(self, features, instances):
                result = super()._forward_mask(features, instances)
                if not self.training:
                    for own in result:
                        own.pred_masks = own.pred_masks / 2
                return result

        for head in (their_head(), our_heads()):
            own, plain = heads_with(head, Own), heads_with(head)
            found, wanted = (detect(heads, make_scene()) for heads in (own, plain))
            for ours, theirs in zip(found, wanted, strict=True):
                torch.testing.assert_close(ours.pred_masks, theirs.pred_masks / 2)

    @pytest.mark.parametrize("make", [their_head, our_heads])
    def test_masks_that_are_switched_off(self, make):
        """As Detectron2's test-time augmentation does for the boxes."""
        heads = heads_with(make())
        heads.mask_on = False
        found = detect(heads, make_scene())
        assert not found[0].has("pred_masks")
        heads.mask_on = True
        given = heads.forward_with_given_boxes(features_of(make_scene()), found)
        assert given[0].has("pred_masks")

    @pytest.mark.parametrize("make", [their_head, our_heads])
    def test_given_boxes_get_new_masks(self, make):
        heads, scene = heads_with(make(), pooler_kernel="torchvision"), make_scene()
        found = detect(heads, scene)
        moved = copy.deepcopy(found)
        for own in moved:
            own.pred_boxes.tensor[:, 2:] += 20
        with torch.no_grad():
            again = heads.forward_with_given_boxes(features_of(scene), copy.deepcopy(found))
            new = heads.forward_with_given_boxes(features_of(scene), moved)
        assert_same_instances(again, found, rtol=0, atol=1e-6)
        assert (new[0].pred_masks - found[0].pred_masks).abs().max() > 0.1

    def test_heads_of_stages_must_fit_the_cascade(self):
        with pytest.raises(ValueError, match="mask_head has 2 heads for 3 stages"):
            heads_with(our_heads(2))
        with pytest.raises(ValueError, match="need a mask_pooler, of the maps of box_pooler"):
            heads_with(our_heads(), pooler=None)
        with pytest.raises(ValueError, match="mask_pooler must be Detectron2's ROIPooler"):
            heads_with(our_heads(), pooler="ROIPool")


@pytest.mark.parametrize("options", [MASKS, EVERY], ids=["last", "every"])
def test_rules_leave_masks_empty(options):
    scene = make_scene()
    every = stir_masks(build_heads(options=[*options, *SAME_KERNEL]))
    some = build_heads(options=[*options, *SAME_KERNEL, *RULES])
    some.load_state_dict(every.state_dict())
    for found, wanted in zip(detect(some, scene), detect(every, scene), strict=True):
        chosen = wanted.scores >= 0.5
        assert 0 < chosen.sum() < len(chosen)
        torch.testing.assert_close(
            found.pred_masks[chosen], wanted.pred_masks[chosen], rtol=0, atol=1e-6
        )
        assert not found.pred_masks[~chosen].any()
        assert torch.equal(found.pred_boxes.tensor, wanted.pred_boxes.tensor)


def masked_targets(scene, kind):
    """Targets with a mask of two rectangles for each object; of the last object they are alike."""
    targets = targets_of(scene)
    for own in targets:
        polygons = []
        for number, box in enumerate(own.gt_boxes.tensor.tolist()):
            left, top, right, bottom = box
            middle = left + (right - left) * (number + 1) / (len(own) + 1)
            polygons.append([[left, top, middle, top, middle, bottom, left, bottom]])
        if kind == "polygon":
            own.gt_masks = PolygonMasks(polygons)
        else:
            height, width = own.image_size
            own.gt_masks = BitMasks.from_polygon_masks(polygons, height, width)
    return targets


@pytest.mark.parametrize("kind", ["polygon", "bitmask"])
def test_sampled_regions_know_their_object(kind):
    """Even where two objects have the same box."""
    scene = make_scene()
    scene.gt_boxes[1][2] = scene.gt_boxes[1][1]
    heads, targets = build_heads().train(), masked_targets(scene, kind)
    with EventStorage():
        sampled = heads.label_and_sample_proposals(proposals_of(scene), number_objects(targets))
    regions = to_labelled_regions(sampled)
    masks = InstanceMasks(targets)
    assert masks.known.all()
    foreground = torch.nonzero(regions.gt_classes < NUM_CLASSES).squeeze(1)
    assert len(foreground) > 5
    own = regions[foreground]
    truth = torch.cat(scene.gt_boxes)
    assert torch.equal(truth[own.gt_index], own.gt_boxes)
    wanted = torch.cat(
        [
            x.gt_masks[x.gt_classes < NUM_CLASSES].crop_and_resize(
                x.proposal_boxes.tensor[x.gt_classes < NUM_CLASSES], 28
            )
            for x in sampled
        ]
    )
    assert torch.equal(masks.crop(own.gt_index, own.boxes, 28), wanted)
    assert not any(x.has("gt_index") for x in targets)


@pytest.mark.parametrize("kind", ["polygon", "bitmask"])
def test_targets_are_those_of_the_standalone_host(kind):
    scene = make_scene()
    targets = masked_targets(scene, kind)
    flat = []
    for own in targets:
        if kind == "polygon":
            flat += [[torch.from_numpy(p) for p in polygons] for polygons in own.gt_masks.polygons]
        else:
            flat += list(own.gt_masks.tensor)
    objects = torch.tensor([6, 0, 3, 3, 5])
    boxes = torch.cat(scene.gt_boxes)[objects] + torch.randn(5, 4)
    found = InstanceMasks(targets).crop(objects, boxes, 28)
    assert torch.equal(found, ObjectMasks(flat).crop(objects, boxes, 28))
    assert 0.1 < found.float().mean() < 0.9


def test_images_without_masks_train_the_boxes_alone():
    heads, scene = build_heads(options=EVERY), make_scene()
    masked = masked_targets(scene, "polygon")
    bare = [masked[0], *targets_of(scene)[1:]]
    assert InstanceMasks(bare).known.tolist() == [True] * 4 + [False] * 3

    def losses(targets):
        torch.manual_seed(0)
        with EventStorage():
            return heads.train()(None, features_of(scene), proposals_of(scene), targets)[1]

    both, one, none = losses(masked), losses(bare), losses(targets_of(scene))
    for stage in range(3):
        assert both[f"loss_cls_stage{stage}"] == none[f"loss_cls_stage{stage}"]
        name = f"loss_mask_stage{stage}"
        assert both[name] != one[name] > 0
        assert none[name] == 0
    sum(none.values()).backward()
    assert all(parameter.grad is not None for parameter in heads.mask_head.parameters())


class TestDetector:
    """What our evaluators see."""

    @pytest.mark.parametrize("options", [MASKS, EVERY], ids=["last", "every"])
    def test_masks_before_they_are_pasted(self, options):
        model = stir_masks(build_detector(model_cfg(options=[*EXITS, *options, *RULES])))
        detector, timer = Detector(model), PartTimer()
        output = detector.detect(INPUTS, stages=True, timer=timer)
        (found,), (pasted,) = output.detections, (x["instances"] for x in detector.outputs)
        assert not pasted.has("box_masks")
        assert found.masks.shape == (len(pasted), 28, 28)
        assert pasted.pred_masks.shape == (len(pasted), 150, 200)
        # Up to rounding at 0.5.
        assert (found.paste(150, 200) != pasted.pred_masks).float().mean() < 1e-4
        chosen = found.masks.flatten(1).any(dim=1)
        assert chosen.tolist() == (found.scores >= 0.5).tolist()
        assert pasted.pred_masks.any(dim=2).any(dim=1)[~chosen].sum() == 0
        assert (output.stats.detected, output.stats.masks) == (len(found), int(chosen.sum()))
        assert timer.milliseconds["masks"] > 0
        each = [stage.detections[0].masks for stage in output.stages]
        if options is EVERY:
            assert [masks.shape[1:] for masks in each] == [(28, 28)] * 3
            assert timer.milliseconds.keys() >= {"full/masks0", "full/masks2"}
        else:
            assert each == [None] * 3

    def test_without_exits_the_last_stage_is_the_result(self):
        detector = Detector(stir_masks(build_detector(model_cfg(options=EVERY))))
        output = detector.detect(INPUTS, stages=True)
        assert len(output.detections[0]) > 5
        torch.testing.assert_close(
            output.stages[2].detections[0].masks, output.detections[0].masks, rtol=0, atol=1e-6
        )

    def test_a_box_that_becomes_empty_takes_its_mask_along(self, monkeypatch):
        detector = Detector(stir_masks(build_detector(model_cfg(options=MASKS))))
        (wanted,) = detector.detect(INPUTS).detections
        forward = EarlyExitCascadeROIHeads.forward

        def with_an_empty_box(*arguments):
            instances, losses = forward(*arguments)
            instances[0].pred_boxes.tensor[2] = torch.tensor([5.0, 5.0, 5.0, 9.0])
            return instances, losses

        monkeypatch.setattr(EarlyExitCascadeROIHeads, "forward", with_an_empty_box)
        (found,) = detector.detect(INPUTS).detections
        rest = torch.arange(len(wanted)) != 2
        assert torch.equal(found.masks, wanted.masks[rest])
        assert torch.equal(found.boxes, wanted.boxes[rest])


def test_test_time_augmentation_with_a_mask_head_for_every_stage():
    cfg = model_cfg(options=[*EVERY, "TEST.AUG.MIN_SIZES", (64, 80), "TEST.AUG.MAX_SIZE", 120])
    model = stir_masks(build_detector(cfg))
    inputs = [{"image": make_image((64, 100)), "height": 64, "width": 100}]
    with torch.no_grad():
        found = GeneralizedRCNNWithTTA(cfg, model)(inputs)[0]["instances"]
    assert len(found) > 5
    assert found.pred_masks.any(dim=2).any(dim=1).float().mean() > 0.8
    assert model.roi_heads.mask_on


class TestConfigurations:
    @pytest.mark.parametrize(
        ("key", "value"), [("NAME", "OwnHead"), ("POOLER_TYPE", ""), ("NORM", "LN")]
    )
    def test_what_heads_of_stages_cannot_have(self, key, value, monkeypatch):
        if key == "NAME":
            own = type("OwnHead", (BaseMaskRCNNHead,), {})
            monkeypatch.setitem(ROI_MASK_HEAD_REGISTRY._obj_map, "OwnHead", own)
        options = [*EVERY, f"MODEL.ROI_MASK_HEAD.{key}", value]
        with pytest.raises(ConfigError, match=rf"ROI_MASK_HEAD\.{key} is .*'every'.*'last'"):
            build_heads(options=options)

    def test_a_head_that_is_not_registered(self):
        options = [*MASKS, "MODEL.ROI_MASK_HEAD.NAME", "NoHead"]
        with pytest.raises(ConfigError, match=r"is .NoHead., which is not registered.*StageMask"):
            build_heads(options=options)

    def test_the_configuration_stays_as_it_is(self):
        cfg = heads_cfg(options=EVERY)
        before = cfg.dump()
        heads = build_heads(options=EVERY)
        assert isinstance(heads.mask_head, StageMaskHeads)
        assert cfg.dump() == before
        assert heads.mask_head[0].predictor.out_channels == NUM_CLASSES


def test_boxes_and_instances_without_masks_are_as_before():
    heads, scene = build_heads(), make_scene()
    found = detect(heads, scene)
    assert not found[0].has("pred_masks")
    assert isinstance(found[0].pred_boxes, Boxes)
    assert isinstance(found[0], Instances)
    assert heads.cascade.masks is None
