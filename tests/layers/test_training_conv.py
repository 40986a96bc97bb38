"""Convolutions that train fast: values and gradients of PyTorch's own, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cascade_det.layers.training_conv import training_conv2d


def with_gradients(conv2d, x, weight, bias, **arguments):
    inputs = [value.detach().clone(memory_format=torch.preserve_format) for value in (x, weight)]
    inputs += [] if bias is None else [bias.clone()]
    for value in inputs:
        value.requires_grad_()
    output = conv2d(*inputs, *([None] if bias is None else []), **arguments)
    ramp = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return output, *torch.autograd.grad((output * ramp).sum(), inputs)


@settings(max_examples=40)
@given(
    images=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 3),
    pads=st.booleans(),
    has_bias=st.booleans(),
    memory_format=st.sampled_from([torch.channels_last, torch.contiguous_format]),
    seed=st.integers(0, 1000),
)
def test_it_is_a_convolution(
    images, channels, size, kernel, stride, pads, has_bias, memory_format, seed
):
    padding = kernel // 2 if pads or kernel > min(size) else 0
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, channels[0], *size, generator=generator)
    x = x.contiguous(memory_format=memory_format)
    weight = torch.randn(channels[1], channels[0], kernel, kernel, generator=generator)
    bias = torch.randn(channels[1], generator=generator) if has_bias else None
    arguments = {"stride": stride, "padding": padding}
    found = with_gradients(training_conv2d, x, weight, bias, **arguments)
    exact = [None if value is None else value.double() for value in (x, weight, bias)]
    wanted = with_gradients(F.conv2d, *exact, **arguments)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_groups_and_unneeded_gradients():
    x = torch.randn(2, 4, 6, 5).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(6, 2, 3, 3, requires_grad=True)
    found = training_conv2d(x, weight, padding=1, groups=2)
    torch.testing.assert_close(found, F.conv2d(x, weight, padding=1, groups=2))
    weight = torch.randn(6, 4, 3, 3)
    whole = with_gradients(F.conv2d, x, weight, None, padding=1)
    training_conv2d(x, weight.requires_grad_(), padding=1).sum().backward()
    assert weight.grad is not None
    assert x.grad is None
    frozen = weight.detach()
    x.requires_grad_()
    training_conv2d(x, frozen, padding=1).sum().backward()
    assert x.grad is not None
    assert whole[0].shape == (2, 6, 6, 5)


@pytest.mark.parametrize("stride", [1, 2])
def test_maps_stay_channels_last(stride):
    """What follows reads and writes them in this order, forward and backward."""
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    output = training_conv2d(x, torch.randn(5, 4, 3, 3).requires_grad_(), stride=stride, padding=1)
    assert output.is_contiguous(memory_format=torch.channels_last)
    gradient = torch.randn_like(output)
    (of_x,) = torch.autograd.grad(output, x, gradient)
    assert of_x.is_contiguous(memory_format=torch.channels_last)


def test_autocast_decides_the_type():
    x = torch.randn(1, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(5, 4, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = training_conv2d(x, weight, padding=1)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert weight.grad.dtype == torch.float32
