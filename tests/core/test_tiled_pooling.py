"""RoI pooling from a map in tiles: what is not computed is never read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cascade_det.core.roi_pooling import RoIPooler
from cascade_det.layers.tiles import TiledMap

STRIDES = (4, 8)


def make_levels(dtype=torch.float32, *, in_one_block=False):
    """A map in tiles, NaN until they are computed, and a coarser one; and the whole levels."""
    conv = nn.Conv2d(6, 6, 3, padding=1).to(dtype)
    x = torch.randn(2, 6, 48, 64).to(dtype).contiguous(memory_format=torch.channels_last)
    sizes = [2 * 48 * 64 * 6, 2 * 24 * 32 * 6]
    block = torch.full((sum(sizes),), torch.nan, dtype=dtype)
    fine, coarse = (
        part.view(2, height, width, 6).permute(0, 3, 1, 2)
        for part, (height, width) in zip(block.split(sizes), ((48, 64), (24, 32)), strict=True)
    )
    coarse.copy_(torch.randn(2, 6, 24, 32))
    if not in_one_block:
        coarse = coarse.clone()
    return TiledMap(x, conv, fine), coarse, [conv(x), coarse]


COORDINATE = st.one_of(st.floats(-20, 280), st.sampled_from([0.0, 32.0, 192.0, 256.0, torch.nan]))
BOX = st.tuples(*[COORDINATE] * 4)


@given(
    boxes=st.lists(BOX, max_size=12),
    aligned=st.booleans(),
    samples=st.sampled_from([0, 2]),
    in_one_block=st.booleans(),
    kernel=st.sampled_from(["bags", "torchvision"]),
)
@settings(max_examples=60)
@torch.no_grad()
def test_crops_are_those_of_the_whole_map(boxes, aligned, samples, in_one_block, kernel):
    tiled, coarse, whole = make_levels(in_one_block=in_one_block)
    x = torch.tensor(boxes).view(-1, 4)
    x = torch.cat([x[:, :2].minimum(x[:, 2:]), x[:, :2].maximum(x[:, 2:])], dim=1)
    images = torch.arange(len(x)) % 2
    pooler = RoIPooler(
        output_size=3, strides=STRIDES, sampling_ratio=samples, aligned=aligned, kernel=kernel
    )
    pyramid = pooler.prepare([tiled, coarse])
    wanted = pooler(pooler.prepare(whole), x, images)
    torch.testing.assert_close(pooler(pyramid, x, images), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_heads_of_another_type_read_converted_tiles(dtype):
    tiled, coarse, whole = make_levels(torch.bfloat16)
    pooler = RoIPooler(output_size=3, strides=STRIDES, kernel="bags")
    boxes = torch.tensor([[10.0, 10, 60, 70], [150, 100, 180, 140], [0, 0, 250, 190]])
    images = torch.tensor([0, 1, 1])
    pyramid = pooler.prepare([tiled, coarse], dtype=dtype)
    expected = pooler(pooler.prepare(whole, dtype=dtype), boxes, images)
    for row in range(3):  # stage after stage reads further tiles
        got = pooler(pyramid, boxes[row : row + 1], images[row : row + 1])
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected[row : row + 1], rtol=2**-7, atol=2**-7)


@torch.no_grad()
def test_only_tiles_that_regions_read_are_computed():
    tiled, coarse, _ = make_levels(in_one_block=True)
    pooler = RoIPooler(output_size=3, strides=STRIDES, kernel="bags")
    pyramid = pooler.prepare([tiled, coarse])
    assert pyramid.table is not None
    assert pyramid.table.data_ptr() == tiled.data.data_ptr()  # no copy
    assert not tiled.computed.any()
    # The second is pooled from the coarser level.
    boxes = torch.tensor([[40.0, 40, 50, 50], [0, 0, 250, 190]])
    pooler(pyramid, boxes, torch.tensor([1, 0]))
    assert tiled.computed.nonzero().tolist() == [[1, 1, 1]]
