"""Residual blocks in 8 bits, against their layers one by one on numbers of the same grids."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cascade_det.backbones.int8_resnet import Int8Block, int8_stages
from cascade_det.backbones.resnet import BasicBlock, BottleneckBlock
from cascade_det.layers.int8 import Grid, multiplies_int8_exactly, quantise_map

pytestmark = pytest.mark.skipif(
    not multiplies_int8_exactly(), reason="this CPU does not multiply 8 bits exactly"
)
STRIDES = {"stride_in_1x1": False, "num_groups": 1, "bottleneck_channels": 8}
BLOCKS = {
    "basic": lambda: BasicBlock(16, 16, stride=1, norm=""),
    "basic, strided": lambda: BasicBlock(16, 32, stride=2, norm=""),
    "bottleneck": lambda: BottleneckBlock(16, 16, stride=1, norm="", **STRIDES),
    "bottleneck, strided": lambda: BottleneckBlock(16, 32, stride=2, norm="", **STRIDES),
    "bottleneck, MSRA": lambda: BottleneckBlock(
        16, 32, stride=2, norm="", **{**STRIDES, "stride_in_1x1": True}
    ),
    "bottleneck, groups": lambda: BottleneckBlock(
        16, 32, stride=1, norm="", **{**STRIDES, "num_groups": 4}
    ),
}
INPUTS = Grid.of_range(0.0, 3.0)
SHORTCUT, INSIDE, OUTPUT = (
    Grid.of_range(-6.0, 5.0),
    Grid.of_range(0.0, 4.0),
    Grid.of_range(0.0, 7.0),
)


def on_grid(x, grid):
    return torch.fake_quantize_per_tensor_affine(x.float(), *grid, 0, 255).double()


def convolve(conv, x):
    weight = conv.weight.detach().double()
    step = weight.flatten(1).abs().amax(dim=1).view(-1, 1, 1, 1) / 127
    weight = (weight / step).round() * step
    return F.conv2d(x, weight, conv.bias.double(), conv.stride, conv.padding, groups=conv.groups)


def naive(block, x):
    x = out = on_grid(x, INPUTS)
    for conv in (c for name, c in block.named_children() if name in ("conv1", "conv2")):
        if conv is block.conv2 and isinstance(block, BasicBlock):
            break
        out = on_grid(convolve(conv, out).relu(), INSIDE)
    last = block.conv2 if isinstance(block, BasicBlock) else block.conv3
    if block.shortcut is not None:
        x = on_grid(convolve(block.shortcut, x), SHORTCUT)
    return (convolve(last, out) + x).relu()


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block(name):
    torch.manual_seed(0)
    block, x = BLOCKS[name](), 3 * torch.rand(2, 16, 9, 10)
    for conv in block.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.normal_(conv.bias, std=0.1)

    def grid_of(module, relu):
        assert relu == (module is not block.shortcut)
        return OUTPUT if module is block else SHORTCUT if module is block.shortcut else INSIDE

    fast = Int8Block(block, INPUTS, grid_of)
    with torch.no_grad():
        got = fast(x)
        assert got.grid == fast.output == OUTPUT
        # An element at the edge of two steps inside the block may take the other one.
        error = (got.to(torch.float64) - naive(block, x).clamp(max=7.0)).abs() / OUTPUT.scale
        assert error.mean() < 0.3
        assert error.max() < 3
        assert naive(block, x).std() > 10 * OUTPUT.scale
        torch.testing.assert_close(fast(quantise_map(x, INPUTS)).values, got.values)


def test_blocks_of_stages_follow_each_other():
    torch.manual_seed(0)
    stages = [
        nn.Sequential(BLOCKS["basic"](), BLOCKS["basic"]()),
        nn.Sequential(BLOCKS["basic, strided"]()),
    ]
    grids = {}

    def grid_of(module, relu):
        return grids.setdefault(module, Grid.of_range(0.0, 1.0 + len(grids)))

    pairs = int8_stages(stages, INPUTS, grid_of)
    assert [block for block, _ in pairs] == [*stages[0], *stages[1]]
    outputs = [grids[block] for block, _ in pairs]
    assert [fast.inputs for _, fast in pairs] == [INPUTS, *outputs[:-1]]
