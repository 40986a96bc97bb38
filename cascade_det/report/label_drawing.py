"""Classes of pixels in pictures, each in its colour, above a legend; needs no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from cascade_det.report.colors import Color, class_color
from cascade_det.report.drawing import legend
from cascade_det.report.mask_drawing import paint_masks

Labels = npt.NDArray[np.integer[Any]]

BACKGROUND = "background"  # A first class of this name has no colour.
_IGNORED: Color = (255, 255, 255)


def draw_labels(
    image_bgr: npt.NDArray[np.uint8],
    labels: Labels,
    class_names: Sequence[str],
    *,
    ignored: int | None = None,
) -> npt.NDArray[np.uint8]:
    """Fill the pixels of every class with its colour, and draw its outlines and a legend.

    A class has the same colour in all pictures. Pixels of a first class ``background`` are those
    of the image.

    Args:
        image_bgr: uint8 ``[H, W, 3]``; not changed.
        labels: ``[H, W]``, the class of every pixel in ``0..K-1``, or the ignored value.
        class_names: K names.
        ignored: this label is white.

    Returns:
        A new picture, uint8 ``[H + h, W, 3]``: the image, and the legend of the classes in it.
    """
    present = present_labels(labels)
    return np.concatenate(
        [
            paint_labels(image_bgr, labels, class_names, ignored=ignored),
            label_legend(image_bgr, present, class_names, ignored=ignored),
        ]
    )


def paint_labels(
    image_bgr: npt.NDArray[np.uint8],
    labels: Labels,
    class_names: Sequence[str],
    *,
    ignored: int | None = None,
) -> npt.NDArray[np.uint8]:
    """As ``draw_labels``, without the legend: uint8 ``[H, W, 3]``."""
    picture = np.ascontiguousarray(image_bgr).copy()
    bare = class_names[0] == BACKGROUND and ignored != 0
    drawn = [label for label in present_labels(labels) if label or not bare]
    masks = ((0, 0, labels == label) for label in drawn)
    paint_masks(picture, masks, [_color(label, ignored) for label in drawn])
    if bare:
        # Wide outlines reach beyond their class.
        cv2.copyTo(image_bgr, (labels == 0).view(np.uint8), picture)
    return picture


def label_legend(
    picture: npt.NDArray[np.uint8],
    labels: Sequence[int],
    class_names: Sequence[str],
    *,
    ignored: int | None = None,
) -> npt.NDArray[np.uint8]:
    """The names of classes on their colours, ``[h, W, 3]``; without a bare background.

    Args:
        picture: ``[H, W, 3]``, whose width and size of letters the legend has.
        labels: in the order of the legend; may include the ignored value.
        class_names: K names.
        ignored: see ``draw_labels``.
    """
    bare = class_names[0] == BACKGROUND and ignored != 0
    shown = [label for label in labels if label or not bare]
    names = ["(ignored)" if label == ignored else class_names[label] for label in shown]
    return legend(picture, names, [_color(label, ignored) for label in shown])


def present_labels(labels: Labels) -> list[int]:
    """The labels that a pixel has, in order."""
    found: list[int] = np.flatnonzero(np.bincount(labels.ravel())).tolist()
    return found


def _color(label: int, ignored: int | None) -> Color:
    return _IGNORED if label == ignored else class_color(label)
