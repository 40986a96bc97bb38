"""One level of the decoder at some pixels, against the whole level."""

import math

import pytest
import torch
from lively_heads import lively
from scipy import ndimage
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from cascade_det.backbones.cascade_decoder import CascadeDecoder
from cascade_det.segmentation.pixel_rows import PixelRows, PixelSet, dilate, map_rows
from cascade_det.segmentation.sparse_decoder import FUSED, SparseLevel

SIZES = [
    ((8, 6), (16, 12)),
    ((5, 7), (9, 15)),
    ((4, 4), (8, 9)),
    ((1, 1), (2, 2)),
    ((3, 2), (2, 5)),
]


def level(fuse="add", sizes=SIZES[0], share=0.05):
    """A decoder, the maps of two images, and random pixels, in one image at least one."""
    decoder = lively(CascadeDecoder((48, 32), fuse=fuse))
    coarser, skip = torch.randn(2, 48, *sizes[0]), torch.randn(2, 32, *sizes[1])
    wanted = torch.rand(2, *sizes[1]) < share
    wanted[1, -1, 0] = True
    return decoder, coarser, skip, wanted


def assert_near(found, expected):
    assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("fuse", ["add", "concat"])
def test_pixels_equal_those_of_the_whole_level(fuse, sizes):
    decoder, coarser, skip, wanted = level(fuse, sizes)
    sparse = SparseLevel(decoder, 1, dense_gates=True)
    found = sparse(PixelRows.of_map(coarser), skip, wanted)
    assert found.pixels.flat.tolist() == wanted.flatten().nonzero()[:, 0].tolist()
    assert_near(found.rows, map_rows(decoder.refine(1, coarser, skip))[found.pixels.flat])


@torch.no_grad()
@pytest.mark.parametrize("fuse", ["add", "concat"])
def test_gates_of_computed_pixels(fuse):
    """Pooled over those within reach, as by plain loops over the images."""
    decoder, coarser, skip, wanted = level(fuse, ((10, 11), (20, 22)), share=0)
    wanted[0, 3, 20] = True
    fused = decoder.fused(1, coarser, skip)
    near = torch.from_numpy(
        ndimage.binary_dilation(wanted.numpy(), torch.ones(1, 2 * FUSED + 1, 2 * FUSED + 1).numpy())
    )
    assert not near.all()
    gates = [decoder.CA1(x[None, :, mask, None]) for x, mask in zip(fused, near, strict=True)]
    x = fused * torch.cat(gates)
    expected = decoder.ConvBlock1(x * decoder.SA(x))
    found = SparseLevel(decoder, 1, dense_gates=False)(PixelRows.of_map(coarser), skip, wanted)
    assert_near(found.rows, map_rows(expected)[found.pixels.flat])


@torch.no_grad()
@pytest.mark.parametrize("sizes", [((10, 12), (20, 24)), ((10, 12), (19, 25))])
def test_nothing_else_is_computed(sizes):
    """What is not a number beyond the reach stays there."""
    decoder, coarser, skip, wanted = level("add", sizes, share=0)
    sparse = SparseLevel(decoder, 1, dense_gates=False)
    before = sparse(PixelRows.of_map(coarser), skip, wanted)
    skip.masked_fill_(~dilate(wanted, FUSED)[:, None], math.nan)
    coarser[0] = coarser[1, :, :5] = math.nan
    found = sparse(PixelRows.of_map(coarser), skip, wanted)
    assert torch.equal(found.rows, before.rows)


@torch.no_grad()
def test_the_decoder_stays_as_it_is():
    """In training mode, its norms not folded."""
    decoder, coarser, skip, wanted = level()
    expected = map_rows(decoder.refine(1, coarser, skip))[wanted.flatten()]
    decoder.train()
    sparse = SparseLevel(decoder, 1, dense_gates=True)
    assert_near(sparse(PixelRows.of_map(coarser), skip, wanted).rows, expected)
    assert decoder.Up1.training
    assert isinstance(decoder.Up1.up[1], nn.BatchNorm2d)


@pytest.mark.parametrize("radius", [0, 1, 3, 9])
def test_dilation(radius):
    mask = torch.rand(3, 7, 5) < 0.1
    square = torch.ones(1, 2 * radius + 1, 2 * radius + 1).numpy()
    before = mask.clone()
    assert dilate(mask, radius).tolist() == ndimage.binary_dilation(mask.numpy(), square).tolist()
    assert torch.equal(mask, before)


@pytest.mark.parametrize("step", [1, 2])
def test_convolution_of_rows(step):
    """Pixels outside the set and the map count as zero."""
    x, mask = torch.randn(2, 5, 6, 4), torch.rand(2, 6, 4) < 0.6
    weight, bias = torch.randn(3, 5, 3, 3), torch.randn(3)
    pixels = PixelSet(mask, step)
    assert sorted(pixels.flat.tolist()) == mask.flatten().nonzero()[:, 0].tolist()
    assert len(pixels.counts) == step**2
    rows = PixelRows(pixels, 5, x)
    rows.rows.copy_(map_rows(x)[pixels.flat])
    out = torch.empty(len(pixels), 3)
    matrix = weight.permute(0, 2, 3, 1).reshape(3, 45)
    rows.convolve(pixels.neighbours(), matrix, bias, out)
    expected = F.conv2d(x * mask[:, None], weight, bias, padding=1).relu()
    assert_close(out, map_rows(expected)[pixels.flat])
