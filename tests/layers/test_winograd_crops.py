"""Winograd's convolutions of many small maps against direct ones in float64."""

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cascade_det.layers.winograd_crops import convolve_crops, memory_shapes
from cascade_det.layers.winograd_kernel import transform_weight


def convolve(x, weight, bias, *, in_place=False):
    """``[R, C, P, P]`` to ``[R, K, P, P]``."""
    (regions, channels, size, _), out_channels = x.shape, len(weight)
    maps = x.permute(3, 2, 0, 1).contiguous()
    out = maps if in_place else torch.full((size, size, regions, out_channels), torch.nan)
    shapes = memory_shapes(size, regions, channels, out_channels)
    memory = torch.full((sum(map(prod, shapes)),), torch.nan)
    convolve_crops(maps, transform_weight(weight), bias, out, memory)
    return out.permute(2, 3, 1, 0)


def truth(x, weight, bias):
    bias = None if bias is None else bias.double()
    return F.conv2d(x.double(), weight.double(), bias, padding=1)


@settings(max_examples=60)
@given(
    regions=st.integers(1, 4),
    channels=st.integers(1, 6),
    out_channels=st.integers(1, 6),
    size=st.integers(1, 19),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(regions, channels, out_channels, size, biased, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(regions, channels, size, size, generator=generator)
    weight = torch.randn(out_channels, channels, 3, 3, generator=generator) / 3
    bias = torch.randn(out_channels, generator=generator) if biased else None
    y = convolve(x, weight, bias).double()
    torch.testing.assert_close(y, truth(x, weight, bias), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [7, 14, 28])
def test_the_error_is_that_of_a_few_roundings(size):
    x, weight = torch.randn(4, 64, size, size).relu_(), torch.randn(64, 64, 3, 3) / 24
    expected = truth(x, weight, None)
    error = (convolve(x, weight, None) - expected).std()
    assert error < 10 * (F.conv2d(x, weight, padding=1) - expected).std()


def test_the_result_may_replace_the_maps():
    x, weight, bias = torch.randn(3, 5, 14, 14), torch.randn(5, 5, 3, 3), torch.randn(5)
    assert torch.equal(convolve(x, weight, bias, in_place=True), convolve(x, weight, bias))
