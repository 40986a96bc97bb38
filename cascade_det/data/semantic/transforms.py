"""Transforms of an image together with the labels of its pixels."""

from __future__ import annotations

import numpy as np
from PIL import Image

from cascade_det.data.semantic.reading import Labels, Picture
from cascade_det.data.transforms import TrainTransform

AUGMENTATIONS = ("flip", "rotate")
_LARGEST_ANGLE = 20  # degrees


class SemanticTransform:
    """Augments and resizes an image and its labels.

    Images are resized as for detection (bilinear, antialiased), labels to the nearest pixel, which
    is Detectron2's way for both.
    """

    def __init__(self, resize: TrainTransform, augmentation: str) -> None:
        """Set the distributions to draw from.

        Args:
            resize: the sizes; its ``flip`` is the augmentation "flip".
            augmentation: ``"flip"``, or ``"rotate"``, see :func:`rotated`, which comes before the
                resizing; ``resize`` then flips nothing.
        """
        self.resize = resize
        self.augmentation = augmentation

    def __call__(
        self, image: Picture, labels: Labels, generator: np.random.Generator
    ) -> tuple[Picture, Labels]:
        """Transform one image, with randomness from ``generator``; the inputs are not changed."""
        if self.augmentation == "rotate":
            image, labels = rotated(image, labels, generator)
        image, placement = self.resize.place(image, generator)
        return image, placement.labels(labels)


def rotated(
    image: Picture, labels: Labels, generator: np.random.Generator
) -> tuple[Picture, Labels]:
    """The published augmentation of Synapse and ACDC.

    With probability 1/2 a turn by a multiple of 90 degrees and a flip along a random axis; else,
    with probability 1/2, a rotation by -20 to 19 whole degrees, each pixel the nearest of before,
    with 0 outside. The published resizing, by cubic splines, is not part of it.
    """
    if generator.random() < 0.5:
        turns, axis = int(generator.integers(4)), int(generator.integers(2))
        return np.flip(np.rot90(image, turns), axis), np.flip(np.rot90(labels, turns), axis)
    if generator.random() < 0.5:
        angle = int(generator.integers(-_LARGEST_ANGLE, _LARGEST_ANGLE))
        return _turned(image, angle), _turned(labels, angle)
    return image, labels


def _turned(array: Picture, angle: int) -> Picture:
    return np.asarray(Image.fromarray(array).rotate(angle, Image.Resampling.NEAREST))
