"""Layers in 8 bits, against the same products of numbers in float64."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from cascade_det.layers.int8 import (
    Grid,
    Int8Conv2d,
    Int8Linear,
    QuantisedMap,
    multiplies_int8_exactly,
    quantise,
    quantise_map,
)

needs_int8 = pytest.mark.skipif(
    not multiplies_int8_exactly(), reason="this CPU does not multiply 8 bits exactly"
)
SIGNED, POSITIVE = Grid.of_range(-3.0, 4.0), Grid.of_range(0.0, 2.5)


def rounded_weight(weight):
    """Weights as 8 bits hold them: 255 steps per output channel, symmetric around 0."""
    weight = weight.detach().double()
    step = weight.flatten(1).abs().amax(dim=1) / 127
    step = step.view(-1, *[1] * (weight.dim() - 1))
    return (weight / step).round() * step


def on_grid(x, grid):
    """Numbers in float64 rounded to a grid, by PyTorch's own simulation."""
    return torch.fake_quantize_per_tensor_affine(x.float(), *grid, 0, 255).double()


@given(
    low=st.floats(-50, 0), high=st.floats(0.01, 50), seed=st.integers(0, 99), rows=st.integers(1, 5)
)
@settings(max_examples=40)
def test_numbers_are_rounded_to_the_nearest_on_the_grid(low, high, seed, rows):
    grid = Grid.of_range(low, high)
    assert 0 <= grid.zero_point <= 255
    x = (torch.rand(rows, 7, generator=torch.Generator().manual_seed(seed)) * 3 - 1) * high
    got = (quantise(x, grid).double() - grid.zero_point) * grid.scale
    inside = x.double().clamp(low, high)
    assert ((got - inside).abs() <= 1.01 * grid.scale).all()  # zero is on the grid, not its ends
    nearly = (got - on_grid(x, grid)).abs()
    assert (nearly <= 1.01 * grid.scale).all()
    assert (nearly > 1e-3 * grid.scale).double().mean() < 0.1  # halves may go either way
    assert (quantise(torch.zeros(1, 1), grid) == grid.zero_point).all()


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [SIGNED, POSITIVE])
@pytest.mark.parametrize(
    ("kernel", "stride", "groups"),
    [(1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 1), (3, 1, 4), (1, 1, 2)],
)
def test_a_convolution(kernel, stride, groups, grid, dtype):
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 24, kernel, stride=stride, padding=kernel // 2, groups=groups)
    x = torch.randn(2, 16, 13, 10)
    expected = F.conv2d(
        on_grid(x, grid),
        rounded_weight(conv.weight),
        conv.bias.double(),
        conv.stride,
        conv.padding,
        groups=groups,
    )
    got = Int8Conv2d(conv, grid, output=dtype)(x)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    # In 8 bits already, of a copy, and after a change of the module's type.
    again = Int8Conv2d(conv, POSITIVE, output=dtype).to(torch.bfloat16)
    again = pickle.loads(pickle.dumps(copy.deepcopy(again)))
    torch.testing.assert_close(again(quantise_map(x, grid)), got, rtol=0, atol=0)
    # A ReLU, and the grid of the output: zero is on it, and half a step is its error.
    output = Grid.of_range(0.0, expected.max().item())
    map_ = Int8Conv2d(conv, grid, output=output, relu=True)(x)
    assert map_.grid == output
    error = (map_.to(torch.float64) - expected.relu()).abs().max()
    assert error <= 0.51 * output.scale


@needs_int8
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_sum_with_a_shortcut(kernel):
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 24, kernel, padding=kernel // 2)
    x, shortcut = torch.randn(2, 16, 9, 10), torch.randn(2, 24, 9, 10)
    convolved = F.conv2d(
        on_grid(x, SIGNED), rounded_weight(conv.weight), conv.bias.double(), padding=kernel // 2
    )
    for grid in (SIGNED, POSITIVE):
        expected = (convolved + on_grid(shortcut, grid)).relu()
        output = Grid.of_range(0.0, expected.max().item())
        layer = Int8Conv2d(conv, SIGNED, output=output, relu=True)
        got = layer.add_to(quantise_map(shortcut, grid), quantise_map(x, SIGNED))
        assert (got.to(torch.float64) - expected).abs().max() <= 0.51 * output.scale


@needs_int8
def test_a_linear_layer():
    torch.manual_seed(0)
    linear, x = nn.Linear(40, 24), torch.randn(5, 40)
    expected = F.linear(on_grid(x, SIGNED), rounded_weight(linear.weight), linear.bias.double())
    got = Int8Linear(linear, SIGNED)(x)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    assert Int8Linear(linear, SIGNED)(x[:0]).shape == (0, 24)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(Int8Linear(linear, SIGNED))))
    assert torch.equal(copied(x), got)


@needs_int8
def test_channels_without_weights_give_their_bias():
    conv = nn.Conv2d(4, 2, 3, padding=1)
    nn.init.zeros_(conv.weight)
    got = Int8Conv2d(conv, SIGNED)(torch.randn(1, 4, 5, 5))
    torch.testing.assert_close(got, conv.bias.view(1, 2, 1, 1).expand(1, 2, 5, 5))


@pytest.mark.parametrize("ends", [(1.0, 2.0), (-2.0, -1.0), (0.0, 0.0)])
def test_zero_is_on_every_grid(ends):
    # The padding of a convolution is zero, whatever the values of its map.
    grid = Grid.of_range(*ends)
    rows = torch.tensor([[0.0, *ends]])
    got = (quantise(rows, grid).double() - grid.zero_point) * grid.scale
    assert got[0, 0] == 0
    torch.testing.assert_close(got, rows.double(), rtol=0, atol=0.51 * grid.scale)


def test_a_map_says_what_it_stands_for():
    values = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    map_ = QuantisedMap(values, Grid(0.5, 128)).to(torch.float32)
    assert map_.flatten().tolist() == [-64.0, 0.0, 63.5]


def test_a_cpu_that_clips_sums_is_known():
    # oneDNN's kernels for AVX2 clip sums of two products to 16 bits.
    code = "from cascade_det.layers.int8 import multiplies_int8_exactly as f; print(f())"
    limited = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=limited, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"
