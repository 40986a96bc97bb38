"""The masks of a json: what pycocotools would read, and an error for what would hurt it."""

import json
from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from cascade_det.masks.segmentation import (
    BAD_POLYGON,
    NO_AREA,
    NO_MASK,
    compact_polygons,
    covers_nothing,
    draw,
    mask_area,
    parse_segmentation,
    plain_segmentation,
)

TRIANGLE = [1.0, 1.0, 7.5, 1.0, 1.0, 4.5]
HEIGHT, WIDTH = 5, 8


def parse(value, height=HEIGHT, width=WIDTH):
    """A mask from a json's value, and the kinds of what is odd about it."""
    notes = []
    entry = json.loads(json.dumps({"segmentation": value}), object_hook=compact_polygons)
    return parse_segmentation(entry["segmentation"], height, width, notes.append), notes


def counts_of(bitmap):
    """Runs of a bitmap column by column, counted one by one."""
    runs, last = [0], False
    for pixel in bitmap.T.ravel().tolist():
        if pixel != last:
            runs.append(0)
            last = pixel
        runs[-1] += 1
    return runs


bitmaps = st.builds(
    lambda seed, height, width, share: np.random.default_rng(seed).random((height, width)) < share,
    st.integers(0, 2**32),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([0, 0.02, 0.5, 0.98, 1]),
)


@given(bitmaps, st.booleans())
def test_rle_of_both_kinds_is_the_bitmap(bitmap, compressed):
    height, width = bitmap.shape
    counts = counts_of(bitmap)
    if compressed:
        encoded = coco_mask.encode(np.asfortranarray(bitmap, np.uint8))
        counts = encoded["counts"].decode()
    mask, notes = parse({"size": [height, width], "counts": counts}, height, width)
    np.testing.assert_array_equal(draw(mask, height, width), bitmap)
    assert mask_area(mask, height, width) == bitmap.sum()
    assert notes == [NO_AREA] * (not bitmap.any())
    assert covers_nothing(mask) is not bitmap.any().item()
    plain = json.loads(json.dumps(plain_segmentation(mask, height, width)))
    np.testing.assert_array_equal(coco_mask.decode(plain), bitmap)


def test_large_runs():
    height, width = 12_000, 16_000  # runs take all characters that may be
    counts = [100_000_000, 3, 1, height * width - 100_000_004]
    for form in (counts, coco_mask.frPyObjects({"size": [height, width], "counts": counts}, 1, 1)):
        value = form if isinstance(form, list) else form["counts"].decode()
        mask, _ = parse({"size": [height, width], "counts": value}, height, width)
        assert mask_area(mask, height, width) == height * width - 100_000_001


def test_polygons_are_arrays_of_the_same_numbers():
    other = [2, 0, 7, 3, 3, 4.25, 1e-3, 2]
    mask, notes = parse([TRIANGLE, other])
    assert [polygon.tolist() for polygon in mask] == [TRIANGLE, other]
    assert all(polygon.dtype == np.float64 for polygon in mask)
    assert notes == []
    rle = coco_mask.frPyObjects([TRIANGLE, other], HEIGHT, WIDTH)
    expected = coco_mask.merge(rle)
    np.testing.assert_array_equal(draw(mask, HEIGHT, WIDTH), coco_mask.decode(expected))
    assert mask_area(mask, HEIGHT, WIDTH) == coco_mask.area(expected)
    assert plain_segmentation(mask, HEIGHT, WIDTH) == [TRIANGLE, other]


def test_polygons_that_would_exhaust_memory_are_handed_on_as_rle():
    far = [1.0, 1.0, 9e5, 1.0, 9e5, 9e5] * 2
    mask, _ = parse([far])
    plain = plain_segmentation(mask, HEIGHT, WIDTH)
    np.testing.assert_array_equal(coco_mask.decode(plain), draw(mask, HEIGHT, WIDTH))


@pytest.mark.parametrize(
    ("value", "kept", "notes"),
    [
        (None, None, [NO_MASK]),
        ([], None, [NO_MASK]),
        ({}, None, [NO_MASK]),
        ([[]], None, [BAD_POLYGON, NO_MASK]),
        ([[1, 2, 3, 4]], None, [BAD_POLYGON, NO_MASK]),
        ([[1, 2, 3, 4, 5, 6, 7]], None, [BAD_POLYGON, NO_MASK]),
        ([[1, 2], TRIANGLE, [1, 2, 3, 4, 5, 6, 7]], [TRIANGLE], [BAD_POLYGON]),
        ([[1, 1, 2, 2, 3, 3]], [[1, 1, 2, 2, 3, 3]], [NO_AREA]),
        ([[1, 1, 2, 2, 3, 3], TRIANGLE], [[1, 1, 2, 2, 3, 3], TRIANGLE], []),
        ([[-90, -90, -80, -90, -80, -80]], [[-90, -90, -80, -90, -80, -80]], []),
    ],
)
def test_odd_masks(value, kept, notes):
    mask, found = parse(value)
    assert (None if mask is None else [p.tolist() for p in mask]) == kept
    assert found == notes
    if mask is not None:
        assert covers_nothing(mask) is (notes == [NO_AREA])


NAN, INF = float("nan"), float("inf")
SIZE = [HEIGHT, WIDTH]
BAD = {
    "mask that is neither": [7, "text", True, 0, ""],
    "mask whose polygons are not lists of numbers": [
        TRIANGLE,
        ["text"],
        [[*TRIANGLE, "1", "2"]],
        [[*TRIANGLE, None, 2]],
        [[[1, 1], [2, 2], [3, 1], [4, 4], [5, 5], [6, 6]]],
        [TRIANGLE, {"a": 1}],
        [None],
        [[*TRIANGLE, 10**400, 1]],
    ],
    "polygon with a coordinate": [
        [[*TRIANGLE, NAN, 1]],
        [[*TRIANGLE, 1, INF]],
        [[*TRIANGLE, 1e300, -1e300]],
        [TRIANGLE, [*TRIANGLE, 1, -2e6]],
    ],
    "mask whose RLE is not an object": [
        {"counts": [40]},
        {"size": SIZE},
    ],
    "mask whose RLE has a 'size' that is not": [
        {"size": 7, "counts": [40]},
        {"size": [5, 8.0], "counts": [40]},
        {"size": [True, 8], "counts": [40]},
        {"size": [5, 8, 1], "counts": [40]},
    ],
    "mask whose RLE has another 'size'": [
        {"size": [8, 5], "counts": [40]},
        {"size": [-5, -8], "counts": [40]},
        {"size": [10**6, 10**6], "counts": [10**12]},
        {"size": [2**40, 2**40], "counts": "0"},
    ],
    "mask whose RLE has 'counts' that are neither": [
        {"size": SIZE, "counts": None},
        {"size": SIZE, "counts": {"a": 1}},
        {"size": SIZE, "counts": []},
        {"size": SIZE, "counts": [40.0]},
        {"size": SIZE, "counts": ["40"]},
        {"size": SIZE, "counts": [True, 39]},
    ],
    "mask whose RLE has 'counts' that are not compressed": [
        {"size": SIZE, "counts": ""},
        {"size": SIZE, "counts": "X"},  # says that more follows
        {"size": SIZE, "counts": "\0" * 40},
        {"size": SIZE, "counts": "1~"},
        {"size": SIZE, "counts": "ö"},
        {"size": SIZE, "counts": "\ud800"},
        {"size": SIZE, "counts": "o" * 20 + "0"},
    ],
    "mask whose RLE has 'counts' that do not add up": [
        {"size": SIZE, "counts": [-1, 41]},
        {"size": SIZE, "counts": [2**32, 40]},
        {"size": SIZE, "counts": [10**400]},
        {"size": SIZE, "counts": [39]},
        {"size": SIZE, "counts": [20, 21]},
        {"size": SIZE, "counts": "4"},
        {"size": SIZE, "counts": "4?"},  # a run below 0
        {"size": SIZE, "counts": "00" + "ooooo0" * 1000},
    ],
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_masks_are_named(kind):
    for value in BAD[kind]:
        with pytest.raises(ValueError, match=f"^{kind}"):
            parse(value)


def test_an_enormous_image():
    with pytest.raises(ValueError, match="too many pixels"):
        parse({"size": [2**20, 2**20], "counts": [2**40]}, 2**20, 2**20)


texts = st.text(st.characters(min_codepoint=45, max_codepoint=115), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=12,
)
masks = (
    st.fixed_dictionaries(
        {
            "size": st.just(SIZE) | values,
            "counts": texts | st.lists(st.integers(-3, 45), max_size=8) | values,
        }
    )
    | st.lists(st.lists(st.integers(-9, 50) | st.floats(), max_size=9), max_size=3)
    | values
)


@given(masks)
@settings(max_examples=200)
def test_any_value_is_a_mask_or_an_error(value):
    try:
        mask, _ = parse(value)
    except ValueError:
        return
    if mask is not None:
        bitmap = draw(mask, HEIGHT, WIDTH)
        assert bitmap.shape == (HEIGHT, WIDTH)
        assert mask_area(mask, HEIGHT, WIDTH) == bitmap.sum()


def test_polygons_become_compact():
    entry = {"segmentation": [TRIANGLE], "id": 1}
    assert compact_polygons(entry) == {"segmentation": [array("d", TRIANGLE)], "id": 1}
    for other in ({"id": 1}, {"segmentation": {"counts": [1], "size": [1, 1]}}):
        assert compact_polygons(dict(other)) == other
