"""Images that a predictor accepts, and its errors for anything else."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cascade_det.data.given_images import check_images, given_pixels

ARRAY = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)


def test_arrays_and_files_are_taken(tmp_path):
    Image.fromarray(ARRAY[:, :, ::-1].copy()).save(tmp_path / "a.png")
    for image in (ARRAY, tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(given_pixels(image, "BGR"), ARRAY)
        np.testing.assert_array_equal(given_pixels(image, "RGB"), ARRAY[:, :, ::-1])
    assert check_images([]) == check_images(()) == []
    assert len(check_images((ARRAY, Path("a.png")), ["x", "y"])) == 2
    for fine in (ARRAY[::-1], np.asfortranarray(ARRAY), ARRAY[:1, :1]):
        assert check_images([fine])


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (ARRAY[:0], "no pixels"),
        (ARRAY[:, :0], "no pixels"),
        (ARRAY[:, :, 0], r"not uint8 \[4, 5\]"),
        (ARRAY[None], r"not uint8 \[1, 4, 5, 3\]"),
        (ARRAY.astype(np.float32), "not float32"),
        (Image.new("RGB", (5, 4)), r"PIL\.Image\.Image: give np\.asarray"),
        (torch.zeros(4, 5, 3), r"torch\.Tensor: give its numpy\(\) array"),
        (None, "not NoneType"),
        (b"a.png", "not bytes"),
        (7, "not int"),
        ({"image": ARRAY}, "not dict"),
        (ARRAY.tolist(), "not list"),
        ([ARRAY], "not list"),
    ],
)
def test_all_else_is_a_value_error_that_says_what_is_wanted(image, words):
    with pytest.raises(ValueError, match=words):
        check_images([ARRAY, image])


def test_several_are_a_list_or_tuple():
    for images in (None, iter([ARRAY]), {ARRAY.tobytes()}, torch.zeros(1, 4, 5, 3)):
        with pytest.raises(ValueError, match="or a list of these, not"):
            check_images(images)
    with pytest.raises(ValueError, match="there are 2 images, but 1 names"):
        check_images([ARRAY, ARRAY], ["a"])
