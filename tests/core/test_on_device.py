"""Counts that a GPU is not waited for, against plain loops."""

import pytest
import torch

from cascade_det.core.structures.boxes import image_bounds
from cascade_det.core.structures.on_device import (
    device_constant,
    group_sizes,
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
