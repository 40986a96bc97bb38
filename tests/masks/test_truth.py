"""Targets of a mask head: Detectron2's, and pixels counted by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_det.masks.truth import ObjectMasks


def random_boxes(generator, count, height, width):
    """Boxes in and around an image; some are tiny."""
    corners = generator.uniform(-0.3, 1.2, (count, 2)) * (width, height)
    sides = generator.uniform(0, 0.8, (count, 2)) * (width, height)
    sides[: count // 8] *= 1e-3
    return torch.tensor(np.concatenate([corners, corners + sides], axis=1), dtype=torch.float32)


def random_polygons(generator, height, width):
    sizes = generator.integers(3, 12, generator.integers(1, 4))
    return [
        torch.from_numpy(generator.uniform(-0.2, 1.2, (n, 2)) * (width, height)).reshape(-1)
        for n in sizes
    ]


@pytest.mark.needs_detectron2
@settings(max_examples=30)
@given(st.integers(0, 2**32), st.sampled_from([7, 28]))
def test_targets_are_detectron2s_to_the_bit(seed, size):
    structures = pytest.importorskip("detectron2.structures.masks", exc_type=ImportError)
    generator = np.random.default_rng(seed)
    height, width = generator.integers(4, 200, 2).tolist()
    polygons = [random_polygons(generator, height, width) for _ in range(4)]
    share = generator.random((4, 1, 1))
    bitmaps = torch.from_numpy(generator.random((4, height, width)) < share)
    objects = torch.from_numpy(generator.integers(0, 4, 30))
    boxes = random_boxes(generator, 30, height, width)
    for masks, theirs in (
        (polygons, structures.PolygonMasks([[p.numpy() for p in ps] for ps in polygons])),
        (list(bitmaps), structures.BitMasks(bitmaps)),
    ):
        targets = ObjectMasks(masks).crop(objects, boxes, size)
        assert targets.dtype == torch.bool
        expected = theirs[objects].crop_and_resize(boxes, size)
        assert torch.equal(targets, expected)


def test_kinds_may_be_mixed_and_masks_unknown():
    square = torch.tensor([2.0, 2.0, 6.0, 2.0, 6.0, 6.0, 2.0, 6.0], dtype=torch.float64)
    bitmap = torch.zeros(12, 12, dtype=torch.bool)
    bitmap[2:6, 2:6] = True
    masks = ObjectMasks([None, [square], bitmap])
    assert masks.known.tolist() == [False, True, True]
    # The box covers the square's lower right quarter and as much beyond it.
    boxes = torch.tensor([[4.0, 4.0, 8.0, 8.0]]).repeat(2, 1)
    for target in masks.crop(torch.tensor([1, 2]), boxes, 4):
        expected = torch.zeros(4, 4, dtype=torch.bool)
        expected[:2, :2] = True
        assert torch.equal(target, expected)
    assert masks.crop(torch.zeros(0, dtype=torch.int64), boxes[:0], 4).shape == (0, 4, 4)


def test_a_mask_far_larger_than_its_box_is_drawn():
    """In cells of a box of no size it is enormous."""
    points = torch.tensor([-3e5, -3e5, 3e5, -3e5, 3e5, 3e5, -3e5, 3e5], dtype=torch.float64)
    box = torch.tensor([[10.0, 10.0, 10.0, 10.0]])
    assert ObjectMasks([[points]]).crop(torch.tensor([0]), box, 28).all()
