"""Deltas by hand, and what must hold for any box."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_det.core.structures.boxes import (
    MAX_LOG_SCALE,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    flatten_images,
    image_bounds,
    is_nonempty,
    select_class,
)

WEIGHTS = (10.0, 20.0, 5.0, 2.5)


def test_deltas_by_hand():
    # 10 x 20 box around (15, 30) onto a 20 x 10 box around (20, 25).
    box = torch.tensor([[10.0, 20.0, 20.0, 40.0]])
    target = torch.tensor([[10.0, 20.0, 30.0, 30.0]])
    wanted = [10 * 0.5, 20 * -0.25, 5 * math.log(2), 2.5 * math.log(0.5)]
    deltas = encode_boxes(box, target, WEIGHTS)
    torch.testing.assert_close(deltas, torch.tensor([wanted]))
    torch.testing.assert_close(decode_boxes(deltas, box, WEIGHTS), target)


def test_zero_deltas_change_nothing():
    box = torch.tensor([[3.0, 4.0, 8.0, 6.0]])
    assert torch.equal(decode_boxes(torch.zeros(1, 4), box, WEIGHTS), box)


def test_deltas_of_every_class_are_decoded_on_their_own():
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 40.0]])
    deltas = torch.tensor(
        [[1.0, 0, 0, 0, 0, 2.0, 0, 0], [0, 0, 5 * math.log(2), 0, 0, 0, 0, 2.5 * math.log(2)]]
    )
    wanted = torch.tensor(
        [
            [1.0, 0.0, 11.0, 10.0, 0.0, 1.0, 10.0, 11.0],
            [15.0, 0.0, 35.0, 40.0, 20.0, -20.0, 30.0, 60.0],
        ]
    )
    torch.testing.assert_close(decode_boxes(deltas, box, WEIGHTS), wanted)


def test_one_step_grows_a_side_at_most_1000_sixteenths():
    box = torch.tensor([[0.0, 0.0, 16.0, 32.0]])
    grown = decode_boxes(torch.tensor([[0.0, 0.0, 1e4, 1e4]]), box, WEIGHTS)
    torch.testing.assert_close(grown, torch.tensor([[-492.0, -984.0, 508.0, 1016.0]]))
    just_below = (MAX_LOG_SCALE - 0.1) * 5
    grown = decode_boxes(torch.tensor([[0.0, 0.0, just_below, 0.0]]), box, WEIGHTS)
    torch.testing.assert_close(grown[0, 2] - grown[0, 0], torch.tensor(1000 * math.exp(-0.1)))


def test_decoding_is_float32_for_half_precision_deltas():
    deltas = torch.tensor([[0.5, -0.25, 0.125, 1.0]])
    box = torch.tensor([[1001.25, 203.5, 1030.75, 257.125]])
    decoded = decode_boxes(deltas.bfloat16(), box, WEIGHTS)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, decode_boxes(deltas, box, WEIGHTS))


boxes = st.tuples(
    st.floats(-500, 500, width=32),
    st.floats(-500, 500, width=32),
    st.floats(1, 500, width=32),
    st.floats(1, 500, width=32),
).map(lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]])
scale = st.floats(0.5, 40)


@given(pairs=st.lists(st.tuples(boxes, boxes), min_size=1, max_size=6), xy=scale, wh=scale)
@settings(max_examples=100)
def test_decoding_inverts_encoding(pairs, xy, wh):
    start, target = (torch.tensor(b, dtype=torch.float32) for b in zip(*pairs, strict=True))
    weights = (xy, xy, wh, wh)
    # The clamp is the one way in which a target stays out of reach.
    sizes, wanted = start[:, 2:] - start[:, :2], target[:, 2:] - target[:, :2]
    reachable = (wanted / sizes < 1000 / 16).all(dim=1)
    decoded = decode_boxes(encode_boxes(start, target, weights), start, weights)
    torch.testing.assert_close(decoded[reachable], target[reachable], rtol=1e-3, atol=0.02)


def test_clipping_uses_the_image_of_each_row():
    limits = image_bounds([(10, 20), (30, 5)], torch.zeros(0))[[1, 0]]
    assert limits.tolist() == [[5, 30, 5, 30], [20, 10, 20, 10]]
    wide = torch.tensor([[-3.0, -4.0, 99.0, 98.0], [-3.0, 4.0, 99.0, 98.0]])
    assert clip_boxes(wide, limits).tolist() == [[0, 0, 5, 30], [0, 4, 20, 10]]
    per_class = torch.stack([wide, wide + 2], dim=1)
    wanted = [[[0, 0, 5, 30], [0, 0, 5, 30]], [[0, 4, 20, 10], [0, 6, 20, 10]]]
    assert clip_boxes(per_class, limits).tolist() == wanted


def test_clipping_keeps_nan_where_it_was():
    clipped = clip_boxes(torch.tensor([[math.nan, -1.0, math.inf, 9.0]]), torch.full((1, 4), 4.0))
    assert math.isnan(clipped[0, 0])
    assert clipped[0, 1:].tolist() == [0, 4, 4]


def test_nonempty_wants_both_sides():
    several = torch.tensor([[0.0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 1, 0], [2, 2, 1, 3], [0, 0, 5, 6]])
    assert is_nonempty(several).tolist() == [True, False, False, False, True]
    assert is_nonempty(several, min_size=5).tolist() == [False] * 5
    assert is_nonempty(several, min_size=4).tolist() == [False] * 4 + [True]


def test_select_class():
    per_class = torch.arange(24.0).view(2, 12)
    assert select_class(per_class, torch.tensor([2, 0])).tolist() == [
        [8, 9, 10, 11],
        [12, 13, 14, 15],
    ]
    agnostic = torch.arange(8.0).view(2, 4)
    assert torch.equal(select_class(agnostic, torch.tensor([2, 0])), agnostic)
    assert select_class(torch.zeros(0, 12), torch.zeros(0, dtype=torch.int64)).shape == (0, 4)


@pytest.mark.parametrize("counts", [(2, 0, 3), (0, 1), (0, 0), (4,)])
def test_flatten_images_remembers_where_rows_come_from(counts):
    per_image = [torch.full((count, 4), float(i)) for i, count in enumerate(counts)]
    rows, image_index = flatten_images(per_image)
    assert image_index.dtype == torch.int64
    assert image_index.tolist() == [i for i, count in enumerate(counts) for _ in range(count)]
    assert rows.shape == (sum(counts), 4)
    assert torch.equal(rows[:, 0], image_index.float())
