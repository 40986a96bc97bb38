"""Convolutions with norms: names, frozen batch norm, freezing, and residual blocks in one pass."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torchvision.ops.misc import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

from cascade_det.backbones import ResNet
from cascade_det.layers.conv_norm import (
    NORMS,
    ConvNorm,
    FrozenBatchNorm2d,
    add_convolved,
    freeze,
    make_norm,
)
from cascade_det.layers.folding import fold_norms

FORMATS = (torch.contiguous_format, torch.channels_last)


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


def test_factors_follow_every_change_of_the_statistics():
    norm, x = fill(FrozenBatchNorm2d(3)), torch.randn(2, 3, 4, 4)

    def changed(change):
        change()
        scale, shift = (factor.view(1, 3, 1, 1) for factor in norm.factors())
        torch.testing.assert_close(scale * x + shift, norm(x))
        return norm.factors()[0]

    first = changed(lambda: None)
    assert norm.factors()[0] is first
    other = fill(FrozenBatchNorm2d(3)).state_dict()
    seen = [first, changed(lambda: norm.load_state_dict(other))]
    copied = copy.deepcopy(norm)  # whose statistics count their changes from the start
    copied.load_state_dict({name: value + 1 for name, value in other.items()})
    scale, shift = (factor.view(1, 3, 1, 1) for factor in copied.factors())
    torch.testing.assert_close(scale * x + shift, copied(x))
    seen.append(changed(lambda: norm.running_var.mul_(3)))
    seen.append(changed(lambda: setattr(norm, "weight", torch.rand(3))))
    changed(lambda: setattr(norm, "bias", torch.rand(3)))
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(seen))


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


def truth(shortcut, x, conv):
    """In float64."""
    convolved = nn.Conv2d.forward(conv.double(), x.double())
    convolved = convolved if conv.norm is None else conv.norm(convolved)
    return (convolved + shortcut.double()).clamp(min=0).float()


@settings(max_examples=150)
@given(
    images=st.integers(0, 3),
    channels=st.integers(1, 20),
    out_channels=st.integers(1, 20),
    kernel_size=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 2]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    norm=st.sampled_from(["", "FrozenBN"]),
    memory_formats=st.tuples(st.sampled_from(FORMATS), st.sampled_from(FORMATS)),
    grad=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_residual_block_ends_in_the_sum(
    images,
    channels,
    out_channels,
    kernel_size,
    stride,
    height,
    width,
    norm,
    memory_formats,
    grad,
    seed,
):
    torch.manual_seed(seed)
    conv = ConvNorm(channels, out_channels, kernel_size, stride=stride, norm=norm)
    conv = conv.eval().to(memory_format=memory_formats[0])
    if conv.norm is not None:
        conv.norm.running_var.uniform_(0.5, 2.0)
        conv.norm.bias.normal_()
    x = torch.randn(images, channels, height, width).contiguous(memory_format=memory_formats[0])
    size = -(-height // stride), -(-width // stride)
    shortcut = torch.randn(images, out_channels, *size)
    shortcut = shortcut.contiguous(memory_format=memory_formats[1])
    before = x.clone(), shortcut.clone()
    with torch.set_grad_enabled(grad):
        y = add_convolved(shortcut, x, conv)
    torch.testing.assert_close(y, truth(before[1], x, conv).to(y.dtype), rtol=1e-4, atol=1e-5)
    assert x.equal(before[0])
    assert y is shortcut or shortcut.equal(before[1])
    assert not (grad and y is shortcut)


def test_a_sum_takes_the_place_of_the_shortcut():
    x, shortcut = (
        torch.randn(1, 8, 6, 6).contiguous(memory_format=torch.channels_last) for _ in range(2)
    )
    with torch.inference_mode():
        assert add_convolved(shortcut, x, ConvNorm(8, 8, 1)).data_ptr() == shortcut.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype):
    x, shortcut = (
        torch.randn(1, 8, 6, 6, dtype=dtype).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    conv = ConvNorm(8, 8, 1).to(dtype)
    with torch.inference_mode():
        exact = copy.deepcopy(conv).double()
        expected = F.relu(exact(x.double()) + shortcut)
        got = add_convolved(shortcut, x, conv)
        assert got.dtype == dtype
        # Half a step of bfloat16, and another one where the product was rounded before the sum.
        step = 2.0**-8 if dtype == torch.bfloat16 else 1e-15
        torch.testing.assert_close(got.double(), expected, rtol=step, atol=4 * step)


@pytest.mark.parametrize("stride_in_1x1", [True, False])
def test_no_map_of_a_trunk_is_written_over(stride_in_1x1):
    torch.manual_seed(0)
    trunk = ResNet(depth=50, norm="FrozenBN", stride_in_1x1=stride_in_1x1).eval()
    fold_norms(trunk)
    trunk = trunk.to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    expected = trunk(images)
    before = images.clone()
    with torch.no_grad():
        maps = trunk(images)
    assert images.equal(before)
    for name, map_ in maps.items():
        # Twenty blocks deep, residuals without norms have grown.
        scale = float(expected[name].detach().abs().max())
        torch.testing.assert_close(map_, expected[name], rtol=1e-4, atol=1e-5 * scale)
