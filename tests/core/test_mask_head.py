"""Mask heads: Detectron2's names, the masks of one class, and which detections get one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from cascade_det.core import ConvUpsampleMaskHead, Detections, MaskRules


def make_head(**changes):
    arguments = {"in_channels": 6, "conv_dims": (32, 64), "upsampled_dim": 5, "num_masks": 3}
    return ConvUpsampleMaskHead(**arguments | changes)


def test_state_dict_has_detectron2_names():
    assert {
        name: tuple(value.shape) for name, value in make_head(norm="GN").state_dict().items()
    } == {
        "mask_fcn1.weight": (32, 6, 3, 3),
        "mask_fcn1.norm.weight": (32,),
        "mask_fcn1.norm.bias": (32,),
        "mask_fcn2.weight": (64, 32, 3, 3),
        "mask_fcn2.norm.weight": (64,),
        "mask_fcn2.norm.bias": (64,),
        "deconv.weight": (64, 5, 2, 2),
        "deconv.bias": (5,),
        "predictor.weight": (3, 5, 1, 1),
        "predictor.bias": (3,),
    }
    assert "mask_fcn1.bias" in make_head().state_dict()


@pytest.mark.parametrize("num_masks", [1, 3])
@pytest.mark.parametrize("regions", [0, 1, 7])
def test_one_class_is_that_channel_of_all_classes(num_masks, regions):
    head = make_head(num_masks=num_masks)
    torch.nn.init.normal_(head.predictor.weight)
    torch.nn.init.normal_(head.predictor.bias)
    pooled, classes = torch.randn(regions, 6, 7, 7), torch.randint(3, (regions,))
    x = pooled
    for conv in (head.mask_fcn1, head.mask_fcn2):
        x = F.conv2d(x, conv.weight, conv.bias, padding=1).clamp(min=0)
    x = F.conv_transpose2d(x, head.deconv.weight, head.deconv.bias, stride=2).clamp(min=0)
    every = F.conv2d(x, head.predictor.weight, head.predictor.bias)  # [R, K, 14, 14]
    channels = classes if num_masks > 1 else torch.zeros_like(classes)
    expected = torch.stack([e[c] for e, c in zip(every, channels, strict=True)]) if regions else x
    logits = head(pooled, classes)
    assert logits.shape == (regions, 14, 14)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected.view_as(logits), rtol=1e-4, atol=1e-4)


def test_a_head_without_convolutions():
    assert make_head(conv_dims=())(torch.randn(2, 6, 4, 4), torch.tensor([0, 2])).shape[1:] == (
        8,
        8,
    )


def test_initial_weights():
    """c2_msra_fill: normal with variance 2 / fan out; the predictor normal with 0.001."""
    torch.manual_seed(0)
    head = make_head(in_channels=128, conv_dims=(128,), upsampled_dim=256, num_masks=80)
    assert head.mask_fcn1.weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    # PyTorch takes dimension 0, the input, for the output of a deconvolution, as Detectron2 does.
    assert head.deconv.weight.std().item() == pytest.approx((2 / (128 * 4)) ** 0.5, rel=0.02)
    assert head.predictor.weight.std().item() == pytest.approx(0.001, rel=0.03)
    for layer in (head.mask_fcn1, head.deconv, head.predictor):
        assert not layer.bias.any()


def iou(a, b):
    sides = (min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1]))
    shared = max(sides[0], 0) * max(sides[1], 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return shared / (sum(areas) - shared)


@given(
    corners=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=8),
    threshold=st.sampled_from([0.0, 0.35, 0.5]),
    limit=st.sampled_from([None, 0.2, 0.6]),
)
def test_rules_leave_out_low_scores_and_what_a_better_box_covers(corners, threshold, limit):
    boxes = [(x, y, x + 4.0, y + 4.0) for x, y in corners]
    scores = [0.9 - 0.1 * i for i in range(len(boxes))]
    expected = [
        score >= threshold
        and (limit is None or all(iou(box, better) < limit for better in boxes[:i]))
        for i, (box, score) in enumerate(zip(boxes, scores, strict=True))
    ]
    none = torch.zeros(len(boxes), dtype=torch.int64)
    detections = Detections(torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), none, none)
    rules = MaskRules(score_threshold=threshold - 1e-6, redundancy_iou=limit)
    assert rules.chosen(detections).tolist() == expected


@pytest.mark.needs_detectron2
@pytest.mark.parametrize("norm", ["", "GN"])
@pytest.mark.parametrize("agnostic", [False, True])
def test_detectron2_head_gives_the_same(norm, agnostic):
    pytest.importorskip("detectron2.engine", exc_type=ImportError)
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.roi_heads.mask_head import (
        MaskRCNNConvUpsampleHead,
        mask_rcnn_inference,
    )
    from detectron2.structures import Instances

    torch.manual_seed(0)
    num_masks = 1 if agnostic else 4
    theirs = MaskRCNNConvUpsampleHead(
        ShapeSpec(channels=32, height=14, width=14),
        num_classes=num_masks,
        conv_dims=[32, 32, 32],
        conv_norm=norm,
    ).eval()
    torch.nn.init.normal_(theirs.predictor.weight)
    ours = make_head(
        in_channels=32, conv_dims=(32, 32), upsampled_dim=32, num_masks=num_masks, norm=norm
    ).eval()
    ours.load_state_dict(theirs.state_dict())
    pooled, classes = torch.randn(9, 32, 14, 14), torch.randint(4, (9,))
    instances = Instances((100, 100), pred_classes=classes)
    with torch.no_grad():
        mask_rcnn_inference(theirs.layers(pooled), [instances])
        masks = ours(pooled, classes).sigmoid()
    torch.testing.assert_close(masks, instances.pred_masks[:, 0], rtol=0, atol=1e-5)
