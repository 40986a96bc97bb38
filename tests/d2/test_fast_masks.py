"""Mask heads of Detectron2 with ``MODEL.CASCADE.FAST``: its masks, its weights, its training."""

import pytest
import torch

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.modeling import ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from small_cascades import make_scene
from small_plugin import MASKS, assert_same_instances, build_heads, detect, twins

from cascade_det.core.fast_masks import FastMaskHead
from cascade_det.d2.mask_heads import ClassMaskHead

pytestmark = pytest.mark.needs_detectron2

WIDE = ["MODEL.ROI_MASK_HEAD.CONV_DIM", 32]  # enough for group norms
FAST = [*MASKS, *WIDE, "MODEL.CASCADE.FAST.ENABLED", True, "MODEL.CASCADE.FAST.DTYPE", "float32"]
ROUNDING = {"rtol": 1e-4, "atol": 1e-3}


def stir(*heads):
    """Give all the first one's weights, with masks of both kinds."""
    for name, parameter in heads[0].named_parameters():
        if "mask_head" in name and "predictor.weight" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    for other in heads[1:]:
        other.load_state_dict(heads[0].state_dict())


@pytest.mark.parametrize("norm", ["", "GN", "BN", "FrozenBN"])
@pytest.mark.parametrize("agnostic", [False, True])
def test_masks_are_detectron2s(norm, agnostic):
    options = ["MODEL.ROI_MASK_HEAD.NORM", norm, "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", agnostic]
    ours, theirs = twins([*FAST, *options])
    stir(theirs, ours)
    wanted = detect(theirs, make_scene())
    assert min(len(x) for x in wanted) > 5
    assert wanted[0].pred_masks.std() > 0.05
    found = detect(ours, make_scene())
    assert_same_instances(found, wanted, **ROUNDING)
    assert found[0].pred_masks.shape == (len(found[0]), 1, 28, 28)
    assert isinstance(ours.cascade.masks.head, FastMaskHead)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(p.requires_grad for p in ours.mask_head.parameters())


def test_a_head_for_every_stage():
    options = [*FAST, "MODEL.CASCADE.MASK.STAGES", "every"]
    fast = build_heads(options=options)
    plain = build_heads(options=[*options, "MODEL.CASCADE.FAST.ENABLED", False])
    stir(plain, fast)
    wanted = detect(plain, make_scene())
    assert_same_instances(detect(fast, make_scene()), wanted, **ROUNDING)
    assert [type(head) for head in fast.cascade.masks.heads] == [FastMaskHead] * 3


def test_no_detections():
    ours, theirs = twins(FAST)
    scene = make_scene(num_proposals=(0, 0))
    assert_same_instances(detect(ours, scene), detect(theirs, scene))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_type_is_that_of_the_box_heads(dtype):
    parts = ["MODEL.CASCADE.FAST.FLOAT32_PARTS", ("roi_heads",) if dtype == "float32" else ()]
    ours, theirs = twins([*FAST, "MODEL.CASCADE.FAST.DTYPE", "bfloat16", *parts])
    stir(theirs, ours)
    found = detect(ours, make_scene())
    assert ours.cascade.masks.head.dtype == getattr(torch, dtype)
    assert all(x.pred_masks.dtype == torch.float32 for x in found)
    # Boxes of other rounding have other crops, so the same ones are given to both.
    features = {"p2": make_scene().features[0], "p3": make_scene().features[1]}
    with torch.no_grad():
        wanted = theirs.forward_with_given_boxes(features, [x[:] for x in found])
    for got, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.pred_masks, true.pred_masks, rtol=0, atol=0.02)


def test_masks_follow_training_and_loading():
    ours, theirs = twins(FAST)
    stir(theirs, ours)
    detect(ours, make_scene())
    for change in (lambda x: x.mul_(-1), lambda x: x.copy_(torch.randn(x.shape))):
        ours.train()
        with torch.no_grad():
            for heads in (ours, theirs):
                torch.manual_seed(1)
                change(heads.mask_head.deconv.weight)
        wanted = detect(theirs, make_scene())
        assert_same_instances(detect(ours.eval(), make_scene()), wanted, **ROUNDING)
    stir(theirs, ours)
    assert_same_instances(detect(ours, make_scene()), detect(theirs, make_scene()), **ROUNDING)


class Sharp(MaskRCNNConvUpsampleHead):
    def layers(self, x):
        return super().layers(x) * 4


def test_a_head_that_computes_more_stays_detectron2s(caplog):
    ROI_MASK_HEAD_REGISTRY._do_register("Sharp", Sharp)
    try:
        ours, theirs = twins([*FAST, "MODEL.ROI_MASK_HEAD.NAME", "Sharp"])
    finally:
        del ROI_MASK_HEAD_REGISTRY._obj_map["Sharp"]
    stir(theirs, ours)
    wanted = detect(theirs, make_scene())
    assert_same_instances(detect(ours, make_scene()), wanted, **ROUNDING)
    assert isinstance(ours.cascade.masks.head, ClassMaskHead)
    assert "stays as it is" in caplog.text
