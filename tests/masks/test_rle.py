"""RLE from files against pycocotools, which must never see what is none."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from cascade_det.masks.rle import compressed


@st.composite
def bitmaps(draw):
    shape = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    share = draw(st.sampled_from([0, 0.02, 0.5, 1]))
    return rng.random(shape) < share


def run_lengths(bitmap):
    """Counted pixel by pixel."""
    runs, inside = [0], False
    for pixel in bitmap.T.ravel().tolist():
        if pixel != inside:
            runs.append(0)
            inside = pixel
        runs[-1] += 1
    return runs


@given(bitmaps())
@settings(max_examples=100)
def test_good_rle_of_both_kinds_is_compressed(bitmap):
    wanted = coco_mask.encode(np.asfortranarray(bitmap, np.uint8))
    size, text = [*bitmap.shape], wanted["counts"].decode()
    for counts in (text, run_lengths(bitmap)):
        found = compressed({"size": size, "counts": counts, "more": 1}, *size)
        assert found == {"size": size, "counts": text}


GOOD = {"size": [4, 5], "counts": "2:44"}  # 2 outside, 10 inside, 4 + 4 outside


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "not an object"),
        ([[1, 1, 5, 1, 5, 5]], "not an object"),
        ({"size": [4, 5]}, "not an object"),
        ({**GOOD, "size": [5, 4]}, "another 'size' than its image"),
        ({**GOOD, "size": [4, 5.0]}, "not \\[height, width\\]"),
        ({**GOOD, "size": "45"}, "not \\[height, width\\]"),
        ({**GOOD, "size": [True, 5]}, "not \\[height, width\\]"),
        ({**GOOD, "counts": None}, "neither a text nor"),
        ({**GOOD, "counts": []}, "neither a text nor"),
        ({**GOOD, "counts": [10, 10.0]}, "neither a text nor"),
        ({**GOOD, "counts": [10, True]}, "neither a text nor"),
        ({**GOOD, "counts": [30, -10]}, "add up"),
        ({**GOOD, "counts": [10, 11]}, "add up"),
        ({**GOOD, "counts": [2**64]}, "add up"),
        ({**GOOD, "counts": ""}, "not compressed"),
        ({**GOOD, "counts": "2:4"}, "add up"),
        ({**GOOD, "counts": "ä"}, "not compressed"),
        ({**GOOD, "counts": "2\0"}, "not compressed"),
        ({**GOOD, "counts": "2\n"}, "not compressed"),
        ({**GOOD, "counts": "2:44P"}, "not compressed"),  # ends within a number
        ({**GOOD, "counts": "oooooooooooooo0"}, "not compressed"),  # of 75 bits
        ({**GOOD, "counts": "O" * 9}, "add up"),  # runs below 0
    ],
)
def test_what_is_no_rle_of_the_image_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        compressed(value, 4, 5)


def test_an_image_of_more_pixels_than_pycocotools_can_count():
    with pytest.raises(ValueError, match="too many pixels"):
        compressed({"size": [2**17, 2**16], "counts": [2**33]}, 2**17, 2**16)


@given(st.text(alphabet=st.characters(min_codepoint=45, max_codepoint=115), max_size=12))
@settings(max_examples=300)
def test_any_text_is_refused_or_is_read_as_pycocotools_reads_it(text):
    try:
        rle = compressed({"size": [6, 7], "counts": text}, 6, 7)
    except ValueError:
        return
    bitmap = coco_mask.decode(rle)
    assert bitmap.shape == (6, 7)
    assert coco_mask.area(rle) == bitmap.sum()
