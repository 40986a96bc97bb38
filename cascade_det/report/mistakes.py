"""Draws an image with its found objects, missed objects and false positives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from cascade_det.report.colors import GREEN, RED, YELLOW
from cascade_det.report.drawing import caption, draw_boxes
from cascade_det.report.mask_drawing import PlacedMask, paint_masks
from cascade_det.text import printable

# Drawn in this order: mistakes on top.
_COLORS = {"found": GREEN, "false positive": RED, "missed": YELLOW}
_LEGEND = {
    "found": "object that was found",
    "false positive": "false positive",
    "missed": "object that was missed",
}
_WHITE = (255, 255, 255)
# Smaller images are enlarged, so that labels do not hide the objects.
_LEAST_SIDE = 480
_MOST_ENLARGED = 4096  # The longer side: a thin image stays small enough for a JPEG.
_LONGEST_NAME = 60


def draw_mistakes(
    image_bgr: npt.NDArray[np.uint8], image: Mapping[str, Any]
) -> npt.NDArray[np.uint8]:
    """Draw the boxes and masks of one of the ``worst_images`` of an analysis.

    Args:
        image_bgr: uint8 ``[H, W, 3]``; not changed.
        image: its entry, see ``analysis.analyze``.

    Returns:
        A new picture, enlarged by a whole number if the image is small, below a legend of the
        colours with their counts.
    """
    factor = enlargement(*image_bgr.shape[:2])
    picture = image_bgr.repeat(factor, axis=0).repeat(factor, axis=1)
    boxes = sorted(image["boxes"], key=_order)
    masked = [box for box in boxes if "segmentation" in box]
    paint_masks(picture, _masks(masked, factor), [_COLORS[box["kind"]] for box in masked])
    corners = factor * np.array([box["bbox"] for box in boxes], np.float64).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    picture = draw_boxes(
        picture,
        corners,
        [_label(box) for box in boxes],
        [_COLORS[box["kind"]] for box in boxes],
    )
    counts = Counter(box["kind"] for box in boxes)
    name = printable(image["file_name"], longest=_LONGEST_NAME)
    lines = [(f"{name}: F1 {image['F1']:.0f} %", _WHITE)]
    lines += [(f"{counts[kind]} x {_LEGEND[kind]}", color) for kind, color in _COLORS.items()]
    return np.concatenate([*(caption(picture, *line) for line in lines), picture])


def enlargement(height: int, width: int) -> int:
    """The factor by which an image of this size is enlarged: 1 if it is not small."""
    short, long = sorted((height, width))
    return max(1, min(_LEAST_SIDE // short, _MOST_ENLARGED // long))


def _order(box: Mapping[str, Any]) -> tuple[int, float]:
    """Of each kind, small boxes on top."""
    return list(_COLORS).index(box["kind"]), -box["bbox"][2] * box["bbox"][3]


def _masks(boxes: Sequence[Mapping[str, Any]], factor: int) -> Iterator[PlacedMask]:
    for box in boxes:
        bits = coco_mask.decode(box["segmentation"]).view(np.bool_)
        yield 0, 0, bits.repeat(factor, axis=0).repeat(factor, axis=1)


def _label(box: Mapping[str, Any]) -> str:
    """The label of a box; empty for found objects, since labels hide other boxes."""
    if box["kind"] == "found":
        return ""
    return f"{box['class']} {box['score']:.2f}" if "score" in box else box["class"]
