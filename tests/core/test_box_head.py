"""Box heads: Detectron2's names, the shapes, and what is refused."""

import pytest
import torch

from cascade_det.core import BoxPredictor, ConvFCBoxHead


def test_state_dict_has_detectron2_names():
    head = ConvFCBoxHead(
        in_channels=6, pooled_size=3, conv_dims=(32, 64), fc_dims=(10, 8), norm="GN"
    )
    assert {name: tuple(value.shape) for name, value in head.state_dict().items()} == {
        "conv1.weight": (32, 6, 3, 3),
        "conv1.norm.weight": (32,),
        "conv1.norm.bias": (32,),
        "conv2.weight": (64, 32, 3, 3),
        "conv2.norm.weight": (64,),
        "conv2.norm.bias": (64,),
        "fc1.weight": (10, 64 * 9),
        "fc1.bias": (10,),
        "fc2.weight": (8, 10),
        "fc2.bias": (8,),
    }
    plain = ConvFCBoxHead(in_channels=6, pooled_size=3, conv_dims=(4,), fc_dims=(5,))
    assert set(plain.state_dict()) == {"conv1.weight", "conv1.bias", "fc1.weight", "fc1.bias"}


@pytest.mark.parametrize(
    ("conv_dims", "fc_dims", "width"),
    [((), (7,), 7), ((4,), (), 4 * 9), ((4, 5), (8, 3), 3)],
)
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_shapes(conv_dims, fc_dims, width, rows):
    head = ConvFCBoxHead(in_channels=6, pooled_size=3, conv_dims=conv_dims, fc_dims=fc_dims)
    assert head.out_features == width
    features = head(torch.randn(rows, 6, 3, 3))
    assert features.shape == (rows, width)
    assert bool((features >= 0).all())


def test_a_head_without_layers_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        ConvFCBoxHead(in_channels=6, pooled_size=3, conv_dims=(), fc_dims=())


@pytest.mark.parametrize(("cls_agnostic", "width"), [(True, 4), (False, 20)])
def test_predictor(cls_agnostic, width):
    predictor = BoxPredictor(in_features=9, num_classes=5, cls_agnostic_bbox_reg=cls_agnostic)
    assert {name: tuple(value.shape) for name, value in predictor.state_dict().items()} == {
        "cls_score.weight": (6, 9),
        "cls_score.bias": (6,),
        "bbox_pred.weight": (width, 9),
        "bbox_pred.bias": (width,),
    }
    features = torch.randn(3, 9)
    logits, deltas = predictor(features)
    torch.testing.assert_close(logits, features @ predictor.cls_score.weight.T)
    torch.testing.assert_close(deltas, features @ predictor.bbox_pred.weight.T)


def test_initial_values_follow_detectron2():
    torch.manual_seed(0)
    predictor = BoxPredictor(in_features=400, num_classes=80, cls_agnostic_bbox_reg=False)
    assert predictor.cls_score.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert predictor.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.05)
    head = ConvFCBoxHead(in_channels=8, pooled_size=7, conv_dims=(64,), fc_dims=(256,))
    # He's normal initialisation by fan-out, and Caffe2's uniform one by fan-in.
    assert head.conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
    limit = (3 / (64 * 49)) ** 0.5
    assert head.fc1.weight.abs().max().item() == pytest.approx(limit, rel=0.01)
    for bias in (head.conv1.bias, head.fc1.bias, predictor.cls_score.bias):
        assert torch.equal(bias, torch.zeros_like(bias))
