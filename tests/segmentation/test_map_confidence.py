"""Confidence of maps against closed forms and plain loops."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from cascade_det.segmentation.map_confidence import (
    MEASURES,
    image_confidence,
    patch_confidence,
    pixel_confidence,
)


def test_closed_forms():
    """Even scores, and two classes that share all but nothing of the rest."""
    even = torch.full((1, 5, 1, 1), 3.0)
    halves = torch.tensor([20.0, 20.0, -20.0, -20.0]).view(1, 4, 1, 1)
    for logits, largest, entropy in ((even, 0.2, 0.0), (halves, 0.5, 1 - math.log(2, 4))):
        assert_close(float(pixel_confidence(logits, "max")), largest, rtol=0, atol=1e-6)
        assert_close(float(pixel_confidence(logits, "entropy")), entropy, rtol=0, atol=1e-6)


@pytest.mark.parametrize("measure", MEASURES)
def test_certainty_is_one_at_any_scale(measure):
    logits = torch.tensor([1e4, -1e4, 0.0]).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    assert_close(image_confidence(logits, measure), torch.ones(2))


def test_images_against_numpy():
    logits = 3 * torch.randn(2, 4, 5, 7, dtype=torch.float64)
    largest = logits.softmax(1).amax(1).flatten(1).numpy()
    assert_close(image_confidence(logits, "max").numpy(), largest.mean(1))
    assert_close(image_confidence(logits, "quantile").numpy(), np.quantile(largest, 0.25, axis=1))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(("size", "patch"), [((8, 12), 4), ((10, 7), 4), ((3, 3), 8)])
def test_patches_are_images_of_their_own(size, patch, measure):
    """Patches of a map twice as fine, the last ones filled up by their last pixels."""
    logits = 3 * torch.randn(2, 3, 5, 6)
    found = patch_confidence(logits, measure, size=size, patch=patch)
    rows, columns = (math.ceil(side / patch) for side in size)
    assert found.shape == (2, rows, columns)
    for i in range(rows):
        for j in range(columns):
            y = [min(i * patch + k, size[0] - 1) * 5 // size[0] for k in range(patch)]
            x = [min(j * patch + k, size[1] - 1) * 6 // size[1] for k in range(patch)]
            alone = image_confidence(logits[:, :, y][:, :, :, x], measure)
            assert_close(found[:, i, j], alone)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_has_no_confidence(measure, bad):
    logits = torch.randn(2, 3, 8, 8)
    logits[1, 2, 6, 1] = bad
    image = image_confidence(logits, measure)
    assert image.isnan().tolist() == [False, True]
    patches = patch_confidence(logits, measure, size=(8, 8), patch=4)
    assert patches.isnan().nonzero().tolist() == [[1, 1, 0]]


def test_bad_arguments():
    with pytest.raises(ValueError, match="'mean'; known: max, quantile, entropy"):
        pixel_confidence(torch.zeros(1, 2, 1, 1), "mean")
    with pytest.raises(ValueError, match="two classes"):
        pixel_confidence(torch.zeros(1, 1, 1, 1), "max")
