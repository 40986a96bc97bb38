"""Small pictures as data URIs: truth and detections of an image side by side."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from pycocotools import mask as coco_mask

from cascade_det.report.colors import GREEN, RED, YELLOW, Color
from cascade_det.report.drawing import draw_boxes
from cascade_det.report.mask_drawing import paint_masks
from cascade_det.report.pages.page import Picture

MOST_PICTURES = 12
SHOWN_PICTURES = 4  # The rest is folded.
# Of each half, so that a dozen pictures take a megabyte or two.
_MOST_SIDE, _LEAST_SIDE = 560, 320
_WIDEST = 1120  # Of a picture that is drawn already.
_QUALITY = 72

Pixels = npt.NDArray[np.uint8]


def side_by_side(image_bgr: Pixels, image: Mapping[str, Any], caption: str) -> Picture:
    """Two pictures of one of the ``worst_images`` of an analysis: its objects, and the detections.

    Objects are green if they were found, else yellow. Detections are green if they found an object,
    else red.

    Args:
        image_bgr: uint8 ``[H, W, 3]``; not changed.
        image: its entry, see ``evaluation.analysis.analyze``.
        caption: of the picture.
    """
    factor = _factor(*image_bgr.shape[:2])
    size = [max(1, round(side * factor)) for side in image_bgr.shape[1::-1]]
    enlarged = factor > 1
    small = cv2.resize(
        image_bgr, size, interpolation=cv2.INTER_NEAREST if enlarged else cv2.INTER_AREA
    )
    objects, detections = [], []
    for box in image["boxes"]:
        if box["kind"] == "false positive":
            detections.append((box, RED))
            continue
        found = box["kind"] == "found"
        objects.append((box, GREEN if found else YELLOW))
        if found and "detection" in box:
            detections.append((box["detection"], GREEN))
    halves = [_drawn(small, boxes, factor) for boxes in (objects, detections)]
    return _picture(halves, caption, (f"objects, {caption}", f"detections, {caption}"))


def small_picture(picture_bgr: Pixels, caption: str) -> Picture:
    """A picture that is drawn already, no wider than a page."""
    height, width = picture_bgr.shape[:2]
    factor = min(1.0, _WIDEST / width, _WIDEST / height)
    size = [max(1, round(width * factor)), max(1, round(height * factor))]
    resized = cv2.resize(picture_bgr, size, interpolation=cv2.INTER_AREA).astype(np.uint8)
    return _picture([resized], caption, [caption])


def _factor(height: int, width: int) -> float:
    longest = max(height, width)
    if longest > _MOST_SIDE:
        return _MOST_SIDE / longest
    # Pixels of a small image stay square.
    return max(1, min(_LEAST_SIDE // min(height, width), _MOST_SIDE // longest))


def _drawn(
    image: Pixels, boxes: Sequence[tuple[Mapping[str, Any], Color]], factor: float
) -> Pixels:
    picture = np.ascontiguousarray(image).copy()
    # Large boxes first, and mistakes above what is right.
    ordered = sorted(boxes, key=lambda pair: (pair[1] != GREEN, -_area(pair[0])))
    masked = [(box["segmentation"], color) for box, color in ordered if "segmentation" in box]
    height, width = picture.shape[:2]
    placed = ((0, 0, _resized_mask(rle, width, height)) for rle, _ in masked)
    paint_masks(picture, placed, [color for _, color in masked])
    corners = factor * np.array([box["bbox"] for box, _ in ordered], np.float64).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    labels = ["" if color == GREEN else _label(box) for box, color in ordered]
    return draw_boxes(picture, corners, labels, [color for _, color in ordered])


def _resized_mask(rle: Mapping[str, Any], width: int, height: int) -> npt.NDArray[np.bool_]:
    bits = cv2.resize(coco_mask.decode(rle), (width, height), interpolation=cv2.INTER_NEAREST)
    mask: npt.NDArray[np.bool_] = bits.view(np.bool_)
    return mask


def _label(box: Mapping[str, Any]) -> str:
    return f"{box['class']} {box['score']:.2f}" if "score" in box else str(box["class"])


def _area(box: Mapping[str, Any]) -> float:
    return float(box["bbox"][2] * box["bbox"][3])


def _picture(pictures: Sequence[Pixels], caption: str, names: Sequence[str]) -> Picture:
    height, width = pictures[0].shape[:2]
    return Picture(caption, [_data_uri(pixels) for pixels in pictures], names, width, height)


def _data_uri(pixels: Pixels) -> Markup:
    # WebP takes about half of a JPEG; every current browser shows it.
    done, content = cv2.imencode(".webp", pixels, [cv2.IMWRITE_WEBP_QUALITY, _QUALITY])
    if not done:
        raise ValueError("the picture cannot be written as WebP")
    text = base64.b64encode(content.tobytes()).decode("ascii")
    return Markup(f"data:image/webp;base64,{text}")  # Base64 has nothing to escape.
