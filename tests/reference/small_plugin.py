"""The plugin in Detectron2, small: the heads on scenes of ``small_cascades``, and whole models."""

from pathlib import Path

import detectron2
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    build_roi_heads,
)
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from shape_runs import ROOT
from small_cascades import CHANNELS, NUM_CLASSES, POOLED, STRIDES, naive_twin

from cascade_det.d2 import add_cascade_config

CONFIGS = ROOT / "configs"
OURS, THEIRS = "EarlyExitCascadeROIHeads", "CascadeROIHeads"
NAMES = ["p2", "p3"]
POOLED_SHAPE = ShapeSpec(channels=CHANNELS, height=POOLED, width=POOLED)
SHAPES = {
    name: ShapeSpec(channels=CHANNELS, stride=stride)
    for name, stride in zip(NAMES, STRIDES, strict=True)
}
EXITS = [
    *("MODEL.CASCADE.EXIT.ENABLED", True),
    *("MODEL.CASCADE.EXIT.THRESHOLDS", (0.7, 0.6)),
    *("MODEL.CASCADE.EXIT.PRUNE_THRESHOLDS", (0.1, 0.2)),
]
SAME_KERNEL = ["MODEL.CASCADE.POOLER_KERNEL", "torchvision"]
MASKS = [
    *("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "MODEL.ROI_MASK_HEAD.NUM_CONV", 1),
]
# Group norm keeps the numbers in range without statistics, which random weights do not have.
SMALL_MODEL = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", 0),
    *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.RESNETS.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", 32),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [96], [128]]),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", 60, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 60),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 32, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_HEADS.NUM_CLASSES", 6),
    *("DATALOADER.NUM_WORKERS", 0),
]


def heads_cfg(name=OURS, options=()):
    """Three stages of one linear layer on two levels."""
    cfg = get_cfg()
    add_cascade_config(cfg)
    model = cfg.MODEL
    model.DEVICE = "cpu"
    model.ROI_HEADS.NAME = name
    model.ROI_HEADS.IN_FEATURES = NAMES
    model.ROI_HEADS.NUM_CLASSES = NUM_CLASSES
    model.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    model.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    model.ROI_BOX_HEAD.NUM_FC = 1
    model.ROI_BOX_HEAD.FC_DIM = 12
    model.ROI_BOX_HEAD.POOLER_RESOLUTION = POOLED
    model.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    cfg.merge_from_list(list(options))
    return cfg


def build_heads(name=OURS, options=(), *, seed=0):
    """From a configuration, in inference, with answers that differ clearly."""
    torch.manual_seed(seed)
    return decided(build_roi_heads(heads_cfg(name, options), SHAPES)).eval()


def decided(heads):
    """The same heads with weights that give confident classes and boxes that move."""
    for predictor in heads.box_predictor:
        torch.nn.init.normal_(predictor.cls_score.weight, std=8.0)
        torch.nn.init.normal_(predictor.bbox_pred.weight, std=1.5)
        torch.nn.init.normal_(predictor.bbox_pred.bias, std=0.5)
    return heads


def twins(options=(), *, kernel=SAME_KERNEL):
    """Ours and Detectron2's own heads with the same weights."""
    ours, theirs = build_heads(OURS, [*options, *kernel]), build_heads(THEIRS, options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def model_cfg(name=OURS, options=(), *, file=CONFIGS / "Base-Cascade-RCNN-FPN.yaml"):
    """A whole detector of 6 classes on a ResNet-18, from one of our files."""
    cfg = get_cfg()
    add_cascade_config(cfg)
    cfg.merge_from_file(str(file))
    cfg.merge_from_list([*SMALL_MODEL, "MODEL.ROI_HEADS.NAME", name, *options])
    return cfg


def build_detector(cfg, *, seed=0):
    """The model in inference, with scores that differ and boxes that move."""
    torch.manual_seed(seed)
    model = build_model(cfg).eval()
    for predictor in model.roi_heads.box_predictor:
        torch.nn.init.normal_(predictor.cls_score.weight, std=0.3)
        torch.nn.init.normal_(predictor.bbox_pred.weight, std=0.3)
        # They grow: over the borders, too, so that it matters where an image ends.
        predictor.bbox_pred.bias.detach().view(-1, 4)[:, 2:] = 3.0
    return model


def keep_in_range(model):
    """Give a random ResNet-50 norms and predictors as after a training, as far as sizes go."""
    for name, value in model.named_buffers():
        if name.endswith("conv3.norm.weight"):
            value.fill_(0.1)
        elif name.endswith("stem.conv1.norm.weight"):
            value.fill_(0.02)
    for predictor in model.roi_heads.box_predictor:
        torch.nn.init.normal_(predictor.cls_score.weight, std=1.2)
        torch.nn.init.normal_(predictor.bbox_pred.weight, std=0.1)


def detectron2_yaml(name):
    """A file of Detectron2's own, beside a clone or in the package, if there is one."""
    package = Path(detectron2.__file__).parent
    for folder in (package.parent / "configs", package / "model_zoo" / "configs"):
        if (folder / name).is_file():
            return str(folder / name)
    pytest.skip(f"Detectron2's {name} is not there")


def make_image(size, *, seed=0):
    """Coloured blocks, float32 ``[3, H, W]`` in 0..255; ``size`` is (height, width)."""
    blocks = 255 * torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(blocks, size).squeeze(0)


def features_of(scene):
    return dict(zip(NAMES, scene.features, strict=True))


def proposals_of(scene):
    return [
        Instances(
            size, proposal_boxes=Boxes(boxes.clone()), objectness_logits=torch.zeros(len(boxes))
        )
        for size, boxes in zip(scene.image_sizes, scene.proposals, strict=True)
    ]


def targets_of(scene):
    rows = zip(scene.image_sizes, scene.gt_boxes, scene.gt_classes, strict=True)
    return [
        Instances(size, gt_boxes=Boxes(boxes.clone()), gt_classes=classes)
        for size, boxes, classes in rows
    ]


def detect(heads, scene):
    with torch.no_grad():
        return heads(None, features_of(scene), proposals_of(scene))[0]


def assert_same_instances(got, wanted, **tolerance):
    """Boxes, scores, classes and masks of lists of ``Instances``; to the last bit by default."""
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    assert len(got) == len(wanted)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.image_size == theirs.image_size
        assert ours.pred_classes.tolist() == theirs.pred_classes.tolist()
        torch.testing.assert_close(ours.scores, theirs.scores, **tolerance)
        torch.testing.assert_close(ours.pred_boxes.tensor, theirs.pred_boxes.tensor, **tolerance)
        for name in ("pred_masks", "pred_keypoints"):
            assert ours.has(name) == theirs.has(name)
            if theirs.has(name):
                torch.testing.assert_close(ours.get(name), theirs.get(name), **tolerance)


def box_head(conv_dims=(), fc_dims=(12,)):
    return FastRCNNConvFCHead(POOLED_SHAPE, conv_dims=list(conv_dims), fc_dims=list(fc_dims))


def box_predictor(weights=(10.0, 10.0, 5.0, 5.0), num_classes=NUM_CLASSES, **changes):
    defaults = {"cls_agnostic_bbox_reg": True, "test_score_thresh": 0.05}
    return FastRCNNOutputLayers(
        ShapeSpec(channels=12),
        box2box_transform=Box2BoxTransform(weights),
        num_classes=num_classes,
        **(defaults | changes),
    )


def plain_arguments(**changes):
    """What Detectron2's ``CascadeROIHeads`` takes, too."""
    weights = [(10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0)]
    return {
        "num_classes": NUM_CLASSES,
        "batch_size_per_image": 16,
        "positive_fraction": 0.25,
        "box_in_features": NAMES,
        "box_pooler": pooler("ROIAlignV2"),
        "box_heads": [box_head() for _ in weights],
        "box_predictors": [box_predictor(stage) for stage in weights],
        "proposal_matchers": [Matcher([iou], [0, 1]) for iou in (0.5, 0.6, 0.7)],
    } | changes


def pooler(kind, **changes):
    return ROIPooler(POOLED, [1 / stride for stride in STRIDES], 0, kind, **changes)


def losses_of(heads, scene, *, seed=0):
    """Losses, with what was put into the event storage."""
    torch.manual_seed(seed)
    with EventStorage() as storage:
        _, losses = heads.train()(None, features_of(scene), proposals_of(scene), targets_of(scene))
        return losses, {name: value for name, (value, _) in storage.latest().items()}


def assert_same_as_naive(heads, scene):
    """Against a loop over images and regions that shares no code."""
    found = detect(heads, scene)
    naive = naive_twin(heads.cascade).detect(scene.features, scene.proposals, scene.image_sizes)
    for instances, wanted in zip(found, naive.detections, strict=True):
        assert instances.pred_classes.tolist() == [d.label for d in wanted]
        assert instances.exit_stages.tolist() == [d.exit_stage for d in wanted]
        assert instances.scores.tolist() == pytest.approx([d.score for d in wanted], abs=1e-4)
        boxes = torch.tensor([d.box for d in wanted]).view(-1, 4)
        torch.testing.assert_close(instances.pred_boxes.tensor, boxes, rtol=1e-4, atol=1e-2)


def assert_same_training(ours, theirs, scene):
    """Losses and gradients of Detectron2's own heads, to the last bit; and what both log."""
    (losses, logged), (expected, their_log) = (losses_of(h, scene) for h in (ours, theirs))
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(losses[name], value), name
    for heads, values in ((ours, losses), (theirs, expected)):
        heads.zero_grad()
        sum(values.values()).backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, gradients[name].grad), name
    assert logged.keys() >= their_log.keys()
    for name, value in their_log.items():
        assert logged[name] == pytest.approx(value), name
