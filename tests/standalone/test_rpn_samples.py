"""Predictions for chosen anchors, against those of whole maps."""

import pytest
import torch
from torch import nn

from cascade_det.layers.rpn_head import RPNHead
from cascade_det.standalone.rpn_samples import predictions_at

SHAPES = ((7, 9), (4, 5), (2, 2), (1, 2))


@pytest.fixture(params=[(-1,), (6, 5)], ids=["one convolution", "two"])
def head(request):
    head = RPNHead(in_channels=4, num_anchors=3, conv_dims=request.param).double()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    return head


@pytest.fixture
def maps():
    return [torch.randn(2, 4, *shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES]


def on_whole_maps(head, maps, image, anchor):
    logits, deltas = head(maps)
    return torch.cat(logits, 1)[image, anchor], torch.cat(deltas, 1)[image, anchor]


def gradients(predictions, inputs):
    total = sum((p * torch.linspace(1, 2, p.numel()).view(p.shape)).sum() for p in predictions)
    return torch.autograd.grad(total, inputs)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_values_and_gradients(head, maps, last):
    inputs = maps
    if last:
        maps = [m.contiguous(memory_format=torch.channels_last) for m in maps]
    total = 3 * sum(height * width for height, width in SHAPES)
    # Every anchor, corners included, in no order; and some of them twice.
    anchor = torch.cat([torch.randperm(total), torch.randint(total, (20,))])
    image = torch.randint(2, anchor.shape)
    found = predictions_at(head, maps, image, anchor)
    wanted = on_whole_maps(head, maps, image, anchor)
    torch.testing.assert_close(found, wanted)
    trained = [*inputs, *head.parameters()]
    torch.testing.assert_close(gradients(found, trained), gradients(wanted, trained))


def test_levels_without_any_anchor(head, maps):
    anchor, image = torch.tensor([5]), torch.tensor([1])
    found = predictions_at(head, maps, image, anchor)
    torch.testing.assert_close(found, on_whole_maps(head, maps, image, anchor))
    of_maps = gradients(found, maps)
    assert of_maps[0][1].any()
    assert not any(gradient.any() for gradient in (of_maps[0][0], *of_maps[1:]))


def test_no_anchor_at_all(head, maps):
    none = torch.zeros(0, dtype=torch.int64)
    logits, deltas = predictions_at(head, maps, none, none)
    assert logits.shape == (0,)
    assert deltas.shape == (0, 4)
    for gradient in torch.autograd.grad(logits.sum() + deltas.sum(), [*maps, *head.parameters()]):
        assert not gradient.any()
