"""The ROI heads inside Detectron2, small, on the scenes of ``small_cascades``."""

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import build_roi_heads
from detectron2.structures import Boxes, Instances
from small_cascades import CHANNELS, NUM_CLASSES, POOLED, STRIDES

from cascade_det.d2 import add_cascade_config

OURS, THEIRS = "EarlyExitCascadeROIHeads", "CascadeROIHeads"
NAMES = ["p2", "p3"]
SHAPES = {
    name: ShapeSpec(channels=CHANNELS, stride=stride)
    for name, stride in zip(NAMES, STRIDES, strict=True)
}
EXITS = [
    *("MODEL.CASCADE.EXIT.ENABLED", True),
    *("MODEL.CASCADE.EXIT.THRESHOLDS", (0.8, 0.8)),
    *("MODEL.CASCADE.EXIT.PRUNE_THRESHOLDS", (0.2, 0.3)),
]
SAME_KERNEL = ["MODEL.CASCADE.POOLER_KERNEL", "torchvision"]


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
        torch.nn.init.normal_(predictor.cls_score.weight, std=3.0)
        torch.nn.init.normal_(predictor.bbox_pred.weight, std=1.5)
        torch.nn.init.normal_(predictor.bbox_pred.bias, std=0.5)
    return heads


def twins(options=(), *, kernel=SAME_KERNEL):
    """Ours and Detectron2's own heads with the same weights."""
    ours, theirs = build_heads(OURS, [*options, *kernel]), build_heads(THEIRS, options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


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
