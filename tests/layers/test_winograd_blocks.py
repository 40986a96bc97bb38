"""Winograd's convolution at some blocks of a map, against PyTorch's of the whole map."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from cascade_det.layers.conv_norm import ConvNorm
from cascade_det.layers.winograd import WinogradConv2d
from cascade_det.layers.winograd_blocks import cells_of_blocks, convolve_blocks, takes_blocks


def make_conv(channels, out_channels, *, bias=True):
    return WinogradConv2d(nn.Conv2d(channels, out_channels, 3, padding=1, bias=bias)).eval()


@given(
    images=st.integers(1, 3),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    channels=st.integers(1, 9),
    bias=st.booleans(),
    in_place=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
@torch.no_grad()
def test_blocks_are_those_of_the_whole_map(images, rows, columns, channels, bias, in_place, seed):
    torch.manual_seed(seed)
    conv = make_conv(channels, 5, bias=bias)
    x = torch.randn(images, channels, 4 * rows, 4 * columns)
    x = x.contiguous(memory_format=torch.channels_last)
    whole = F.conv2d(x, conv.weight, conv.bias, padding=1).permute(0, 2, 3, 1).flatten(0, 2)
    blocks = (torch.rand(images, rows, columns) < 0.5).nonzero()
    cells = cells_of_blocks(blocks, 4 * rows, 4 * columns)
    found = torch.full_like(whole, torch.nan)
    if in_place:
        convolve_blocks(x, conv, blocks, found, cells)
    else:
        listed = torch.empty(16 * len(blocks), 5)
        convolve_blocks(x, conv, blocks, listed)
        found[cells.flatten()] = listed
    is_listed = torch.zeros(len(whole), dtype=torch.bool)
    for image, row, column in blocks.tolist():
        for y in range(4 * row, 4 * row + 4):
            first = (image * 4 * rows + y) * 4 * columns + 4 * column
            is_listed[first : first + 4] = True
    torch.testing.assert_close(found[is_listed], whole[is_listed], rtol=0, atol=1e-4)
    assert found[~is_listed].isnan().all()


@torch.no_grad()
def test_many_blocks_go_through_bands():
    conv = make_conv(8, 8)
    x = torch.randn(2, 8, 192, 192).contiguous(memory_format=torch.channels_last)
    blocks = torch.ones(2, 48, 48, dtype=torch.bool).nonzero()  # more than a band has
    found = torch.full((2 * 192 * 192, 8), torch.nan)
    convolve_blocks(x, conv, blocks, found, cells_of_blocks(blocks, 192, 192))
    whole = F.conv2d(x, conv.weight, conv.bias, padding=1).permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-4)


@torch.no_grad()
def test_which_convolutions_take_blocks():
    conv, x = make_conv(8, 8), torch.randn(1, 8, 8, 8)
    assert takes_blocks(conv, x)
    assert not takes_blocks(conv, x.to(torch.bfloat16))
    assert not takes_blocks(conv.to(torch.bfloat16), x)
    assert not takes_blocks(nn.Conv2d(8, 8, 3, padding=1), x)
    with_norm = WinogradConv2d(ConvNorm(8, 8, 3, norm="BN").eval())
    assert not takes_blocks(with_norm, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes_blocks(make_conv(8, 8), x)


@pytest.mark.parametrize("threads", [1, 2])
@torch.no_grad()
def test_no_blocks_are_no_work(threads):
    conv, x = make_conv(4, 4), torch.randn(1, 4, 8, 8)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = torch.zeros(64, 4)
        none = torch.zeros(0, 3, dtype=torch.int64)
        convolve_blocks(x, conv, none, found, cells_of_blocks(none, 8, 8))
        assert not found.any()
    finally:
        torch.set_num_threads(before)
