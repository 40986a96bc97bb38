"""Convolutions with norms: names, frozen batch norm against torchvision's, freezing a part."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops.misc import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

from cascade_det.layers import NORMS, ConvNorm, FrozenBatchNorm2d, freeze, make_norm


def fill(norm):
    """Give a batch norm values other than the ones it starts with."""
    for name, value in norm.state_dict().items():
        if value.dtype.is_floating_point:
            value.copy_(torch.rand(value.shape) + (0.5 if name == "running_var" else 0.0))
    return norm


def test_frozen_batch_norm_equals_torchvision():
    ours, theirs = fill(FrozenBatchNorm2d(6, eps=1e-3)), TorchvisionFrozenBatchNorm2d(6, eps=1e-3)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 5, 4)
    torch.testing.assert_close(ours(x), theirs(x))
    assert not list(ours.parameters())
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    ours.train()(x)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, before[name])


def test_frozen_batch_norm_passes_gradients_through():
    norm = fill(FrozenBatchNorm2d(3))
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    norm(x).sum().backward()
    slope = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(x.grad, slope.view(1, 3, 1, 1).expand_as(x))


@pytest.mark.parametrize("name", ["FrozenBN", "BN", "GN", "SyncBN"])
def test_conv_norm_names(name):
    conv = ConvNorm(3, 32, 3, norm=name)
    names = set(conv.state_dict())
    assert {"weight", "norm.weight", "norm.bias"} <= names
    assert "bias" not in names
    assert isinstance(conv.norm, nn.GroupNorm if name == "GN" else NORMS[name])


def test_conv_norm_is_a_convolution_then_a_norm():
    conv = ConvNorm(4, 6, 3, stride=2, groups=2, norm="FrozenBN")
    fill(conv.norm)
    x = torch.randn(2, 4, 9, 7)
    wanted = conv.norm(F.conv2d(x, conv.weight, stride=2, padding=1, groups=2))
    torch.testing.assert_close(conv(x), wanted)
    plain = ConvNorm(4, 6, 1)
    assert set(plain.state_dict()) == {"weight", "bias"}
    torch.testing.assert_close(plain(x), F.conv2d(x, plain.weight, plain.bias))


def test_group_norm_has_32_groups():
    assert make_norm("GN", 64).num_groups == 32


def test_no_norm_and_unknown_norms():
    assert make_norm("", 4) is None
    with pytest.raises(ValueError, match=r"'LN'.*FrozenBN, BN, SyncBN, GN"):
        make_norm("LN", 4)


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_freezing_keeps_what_a_part_computes(norm):
    part = nn.Sequential(ConvNorm(3, 6, 3, norm=norm), nn.Sequential(ConvNorm(6, 4, 1, norm=norm)))
    for conv in (part[0], part[1][0]):
        fill(conv.norm)
        conv.norm.eps = 1e-3
    x = torch.randn(2, 3, 6, 5)
    part.eval()
    wanted = part(x)
    names = {name for name in part.state_dict() if not name.endswith("num_batches_tracked")}
    freeze(part)
    part.train()
    torch.testing.assert_close(part(x), wanted)
    assert set(part.state_dict()) == names
    assert not any(p.requires_grad for p in part.parameters())
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in part.modules())


def test_freezing_leaves_other_norms_alone():
    part = nn.Sequential(ConvNorm(3, 32, 3, norm="GN"))
    freeze(part)
    assert isinstance(part[0].norm, nn.GroupNorm)
    assert not part[0].norm.weight.requires_grad
