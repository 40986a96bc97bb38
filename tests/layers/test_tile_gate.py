"""Which tiles are computed, against loops over cells."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import roi_align

from cascade_det.layers.tile_gate import open_tiles, tile_scores, tiles_of_boxes
from cascade_det.layers.tiles import TILE, WHOLE_FROM_WITH_BORDER

SHAPE = (2, 3, 4)  # images, rows and columns of tiles
CELLS = TILE // 2  # per side of a tile, on a map of twice the stride


def make_logits(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3 * CELLS, 4 * CELLS, generator=generator) * 2 - 4


def naive_open(logits, threshold):
    """Cell by cell: a cell that reaches the threshold opens its tile and those it touches."""
    is_open = torch.zeros(SHAPE, dtype=torch.bool)
    for image, row, column in (logits.sigmoid() >= threshold).nonzero().tolist():
        for y in range(max(row - 1, 0), min(row + 2, logits.shape[1])):
            for x in range(max(column - 1, 0), min(column + 2, logits.shape[2])):
                is_open[image, y // CELLS, x // CELLS] = True
    return is_open


@given(seed=st.integers(0, 200), threshold=st.floats(0.001, 0.999))
@settings(max_examples=40)
def test_a_tile_is_open_where_objectness_in_or_beside_it_reaches_the_threshold(seed, threshold):
    logits = make_logits(seed)
    wanted = naive_open(logits, threshold)
    for image, own in enumerate(wanted):
        if own.float().mean() >= WHOLE_FROM_WITH_BORDER:
            wanted[image] = True  # which is faster
    assert torch.equal(open_tiles(tile_scores(logits), threshold), wanted)


def test_a_threshold_of_1_opens_nothing():
    logits = torch.full_like(make_logits(0), 40.0)  # a sigmoid of 1 in float32
    assert not open_tiles(tile_scores(logits), 1.0).any()
    assert open_tiles(tile_scores(logits), 0.999).all()


def test_an_image_is_opened_alone():
    logits = make_logits(1)
    both = open_tiles(tile_scores(logits), 0.1)
    for image in range(2):
        alone = open_tiles(tile_scores(logits[image : image + 1]), 0.1)
        assert torch.equal(alone[0], both[image])


COORDINATE = st.one_of(st.floats(-30, 160), st.sampled_from([0.0, 32.0, 64.0, 96.0, 128.0]))


@given(box=st.tuples(*[COORDINATE] * 4), image=st.integers(0, 1), aligned=st.booleans())
@settings(max_examples=200)
def test_tiles_of_a_box_hold_every_cell_that_roi_align_reads(box, image, aligned):
    scale = 0.25
    x0, y0, x1, y1 = box
    box = torch.tensor([[min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)]])
    got = tiles_of_boxes(box, torch.tensor([image]), SHAPE, scale=scale, aligned=aligned)
    assert not got[1 - image].any()
    read = torch.zeros(SHAPE[1] * TILE, SHAPE[2] * TILE)
    read.requires_grad_()
    pooled = roi_align(read[None, None], [box], 7, scale, 0, aligned)
    (gradient,) = torch.autograd.grad(pooled.sum(), read)
    for row, column in gradient.nonzero().tolist():
        assert got[image, row // TILE, column // TILE]
    # And hardly more: within two cells of the box.
    rows, columns = got[image].nonzero().unbind(1)
    is_box = (box[0, 2:] > box[0, :2]).all()
    if len(rows) and is_box and (box[0] >= 0).all() and box[0, 2] <= 120 and box[0, 3] <= 88:
        assert columns.min() * TILE >= math.floor(box[0, 0] * scale - 1) - TILE + 1
        assert columns.max() * TILE <= box[0, 2] * scale + 2.5
        assert rows.min() * TILE >= math.floor(box[0, 1] * scale - 1) - TILE + 1
        assert rows.max() * TILE <= box[0, 3] * scale + 2.5


@pytest.mark.parametrize("count", [0, 3])
def test_boxes_that_are_no_boxes_read_the_first_tile(count):
    boxes = torch.full((count, 4), torch.nan)
    images = torch.ones(count, dtype=torch.int64)
    got = tiles_of_boxes(boxes, images, SHAPE, scale=0.25, aligned=True)
    assert got.nonzero().tolist() == [[1, 0, 0]] * bool(count)
