"""Masks in pictures, each with a translucent fill and an outline; needs no PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import cv2
import numpy as np
import numpy.typing as npt

from cascade_det.masks.pasting import Bits
from cascade_det.report.colors import Color

_OPACITY = 0.5  # of the fill

# Of a part of the picture: its first row, its first column, and bool [h, w].
PlacedMask = tuple[int, int, Bits]


def draw_masks(
    image_bgr: npt.NDArray[np.uint8], masks: Sequence[Bits], colors: Sequence[Color]
) -> npt.NDArray[np.uint8]:
    """Draw masks, the smaller ones on top.

    Args:
        image_bgr: uint8 ``[H, W, 3]``; not changed.
        masks: N of bool ``[H, W]``.
        colors: N colours, BGR.

    Returns:
        A new picture of the same size; boxes and labels can be drawn into it.
    """
    picture = np.ascontiguousarray(image_bgr).copy()
    order = sorted(range(len(masks)), key=lambda i: -np.count_nonzero(masks[i]))
    paint_masks(picture, ((0, 0, masks[i]) for i in order), [colors[i] for i in order])
    return picture


def paint_masks(
    picture: npt.NDArray[np.uint8], masks: Iterable[PlacedMask], colors: Iterable[Color]
) -> None:
    """Draw masks into a picture, the last one on top; holds the pixels of one mask at a time.

    A pixel has the colour of its topmost mask alone, since a mixture would name no mask. Outlines
    are above all fills, so that covered parts can be seen too.

    Args:
        picture: uint8 ``[H, W, 3]``, contiguous; changed.
        masks: N masks.
        colors: N colours, BGR.
    """
    original = picture.copy()
    outlines = []
    for (top, left, bits), color in zip(masks, colors, strict=True):
        inside = bits.view(np.uint8)
        x, y, width, height = cv2.boundingRect(inside)
        if not width:
            continue
        inside = inside[y : y + height, x : x + width]
        top, left = top + y, left + x
        part = np.s_[top : top + height, left : left + width]
        cv2.copyTo(cv2.LUT(original[part], _mixed_with(color)), inside, picture[part])
        found = cv2.findContours(
            inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE, offset=(left, top)
        )
        outlines.append((found[0], color))
    for contours, color in outlines:
        cv2.drawContours(picture, contours, -1, color, line_width(picture))


def line_width(picture: npt.NDArray[np.uint8]) -> int:
    """Pixels of lines in a picture of this size."""
    return max(1, round(min(picture.shape[:2]) / 400))


def _mixed_with(color: Color) -> npt.NDArray[np.uint8]:
    """``[1, 256, 3]``: each value of a channel mixed with a colour."""
    values = np.arange(256.0)[None, :, None]
    return ((1 - _OPACITY) * values + _OPACITY * np.array(color)).astype(np.uint8)
