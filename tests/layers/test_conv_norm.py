"""The end of residual blocks in one pass, and what may be written over."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from cascade_det.backbones import ResNet
from cascade_det.layers import ConvNorm, add_convolved
from cascade_det.layers.folding import fold_norms

FORMATS = (torch.contiguous_format, torch.channels_last)


def truth(shortcut, x, conv):
    """In float64."""
    convolved = nn.Conv2d.forward(conv.double(), x.double())
    convolved = convolved if conv.norm is None else conv.norm(convolved)
    return (convolved + shortcut.double()).clamp(min=0).float()


@settings(max_examples=150, deadline=None)
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
        expected = F.relu(conv(x) + shortcut)
        assert add_convolved(shortcut, x, conv).equal(expected)


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
