"""Counts and NMS that a GPU is not waited for, against plain loops and torchvision."""

import pytest
import torch
from small_cascades import random_boxes
from torchvision.ops import batched_nms

from cascade_det.core.structures.boxes import image_bounds
from cascade_det.core.structures.on_device import (
    device_constant,
    group_sizes,
    grouped_nms,
    indices_by_group,
)


@pytest.mark.parametrize(
    ("groups", "count"), [([2, 0, 2, 2, 4, 0], 5), ([0, 0, 0], 1), ([], 1), ([], 3)]
)
def test_groups_equal_a_loop(groups, count):
    wanted = [[row for row, own in enumerate(groups) if own == group] for group in range(count)]
    rows = torch.tensor(groups, dtype=torch.int64)
    assert [own.tolist() for own in indices_by_group(rows, count)] == wanted
    assert group_sizes(rows, count).tolist() == [len(own) for own in wanted]


@pytest.mark.parametrize("count", [0, 1, 300, 1200])
@pytest.mark.parametrize("most", [None, 500])
def test_nms_of_groups_is_torchvisions(count, most):
    generator = torch.Generator().manual_seed(count)
    boxes = random_boxes(count, (200, 300), generator=generator)
    scores = torch.rand(count, generator=generator)
    groups = torch.randint(5, (count,), generator=generator)
    kept = grouped_nms(boxes, scores, groups, 0.5, most_in_one_call=most)
    assert torch.equal(kept, batched_nms(boxes, scores, groups, 0.5))
    assert count < 2 or 0 < len(kept) < count


def test_constants_are_made_once_and_can_be_trained_with():
    device_constant.cache_clear()
    with torch.inference_mode():
        first = image_bounds([(10, 20), (30, 5)], torch.zeros(0))
    again = image_bounds([torch.Size((10, 20)), torch.Size((30, 5))], torch.zeros(0))
    assert again is first
    assert first.tolist() == [[20, 10, 20, 10], [5, 30, 5, 30]]
    weight = torch.ones(2, 4, requires_grad=True)
    (weight * first).sum().backward()
    assert torch.equal(weight.grad, first)
