"""Pasted masks against PyTorch's grid_sample, and their RLE against pycocotools."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco_mask
from torch.nn import functional as F

from cascade_det.masks.pasting import paste_masks
from cascade_det.masks.rle import encode_pasted

# Interpolation in another order rounds differently.
NEAR = 1e-4

coordinates = st.one_of(
    st.floats(-80, 120, width=32),
    st.integers(-20, 60).map(float),
    st.floats(-3000, 3000, width=32),
)


@st.composite
def cases(draw):
    """A mask, its box, and the height and width of an image that the box may leave."""
    size = draw(st.sampled_from([1, 2, 5, 28]))
    seed = draw(st.integers(0, 2**31))
    cells = np.random.default_rng(seed).random((size, size), np.float32)
    mask = draw(
        st.sampled_from([cells, np.round(cells), cells**8, np.ones_like(cells), 0.5 + cells / 2])
    )
    ends = st.one_of(coordinates, st.floats(0, 2, width=32))
    x, y = draw(coordinates), draw(coordinates)
    width, height = draw(ends), draw(ends)
    box = np.array([x, y, max(x, x + width), max(y, y + height)], np.float32)
    mask = np.maximum(mask, np.float32(1e-6))  # All zeros would be no mask.
    return mask, box, draw(st.integers(1, 60)), draw(st.integers(1, 60))


def interpolated(mask, box, height, width):
    """Values float64 ``[height, width]``, by the definition in Mask R-CNN's reference code."""
    x0, y0, x1, y1 = box.astype(np.float64).tolist()
    ys = (torch.arange(height, dtype=torch.float64) + 0.5 - y0) / (y1 - y0) * 2 - 1
    xs = (torch.arange(width, dtype=torch.float64) + 0.5 - x0) / (x1 - x0) * 2 - 1
    grid = torch.stack(torch.meshgrid(ys, xs, indexing="ij")[::-1], dim=-1)
    cells = torch.from_numpy(mask).double()[None, None]
    return F.grid_sample(cells, grid[None], align_corners=False)[0, 0].numpy()


@given(cases())
@settings(max_examples=300)
def test_pixels_are_those_of_grid_sample(case):
    mask, box, height, width = case
    (pasted,) = paste_masks(mask[None], box[None], height, width)
    assert pasted.shape == (height, width)
    assert pasted.dtype == np.bool_
    if (box[2:] <= box[:2]).any():
        assert not pasted.any()
        return
    values = interpolated(mask, box, height, width)
    decided = np.abs(values - 0.5) > NEAR
    np.testing.assert_array_equal(pasted[decided], values[decided] >= 0.5)


@given(cases())
@settings(max_examples=300)
def test_rle_is_byte_for_byte_that_of_pycocotools(case):
    mask, box, height, width = case
    (pasted,) = paste_masks(mask[None], box[None], height, width)
    wanted = coco_mask.encode(np.asfortranarray(pasted, np.uint8))
    (rle,) = encode_pasted(mask[None], box[None], height, width)
    assert rle == {"size": [height, width], "counts": wanted["counts"].decode()}


@pytest.mark.parametrize("values", [(1, 1), (0.6, 0.4), (0.4, 0.6), (0, 0.001)])
def test_a_mask_over_the_whole_image(values):
    # Columns that end at the lower border go on in the next one.
    mask = np.tile(np.array(values, np.float32), (2, 1))
    box = np.array([-4, -40, 14, 50], np.float32)
    (pasted,) = paste_masks(mask[None], box[None], 7, 9)
    (rle,) = encode_pasted(mask[None], box[None], 7, 9)
    np.testing.assert_array_equal(coco_mask.decode(rle), pasted)
    assert pasted.mean() == {(1, 1): 1, (0.6, 0.4): 5 / 9, (0.4, 0.6): 4 / 9}.get(values, 0)


def test_a_detection_without_a_mask_has_no_rle():
    masks = np.zeros((3, 28, 28), np.float32)
    masks[1], masks[2, 3, 3] = 0.9, 1e-30
    found = encode_pasted(masks, np.tile(np.array([[2, 2, 9, 9]], np.float32), (3, 1)), 20, 20)
    assert found[0] is None
    assert coco_mask.area(found[1]) == 49
    # Below the threshold everywhere, but a mask.
    assert coco_mask.area(found[2]) == 0


def test_of_no_detections():
    nothing = np.zeros((0, 28, 28), np.float32), np.zeros((0, 4), np.float32)
    assert encode_pasted(*nothing, 20, 30) == []
    assert paste_masks(*nothing, 20, 30).shape == (0, 20, 30)


@given(arrays.arrays(np.float32, (4, 4), elements=st.floats(0, 1, width=32)), st.integers(0, 6))
def test_moving_a_box_by_whole_pixels_moves_its_pixels(mask, shift):
    box = np.array([1, 2, 8.5, 9.25], np.float32)
    moved = box + np.array([shift, 2 * shift] * 2, np.float32)
    here, there = (paste_masks(mask[None], b[None], 30, 30)[0] for b in (box, moved))
    np.testing.assert_array_equal(there[2 * shift :, shift:], here[: 30 - 2 * shift, : 30 - shift])


def test_rle_of_large_images_takes_no_memory_for_pixels():
    """100 masks of a 4,000 x 3,000 image are 1.2 GB of pixels."""
    rng = np.random.default_rng(0)
    masks = rng.random((100, 28, 28), np.float32)
    boxes = np.tile(np.array([[0, 0, 4000, 3000]], np.float32), (100, 1))
    tracemalloc.start()
    rles = encode_pasted(masks, boxes, 3000, 4000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(len(rle["counts"]) for rle in rles) > 1_000_000
    # The text itself, and what one mask needs.
    assert peak < 30_000_000
