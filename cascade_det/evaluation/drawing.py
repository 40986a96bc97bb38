"""Detections and other boxes drawn into a picture."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from torch import Tensor

from cascade_det.core.structures import Detections

# BGR per exit stage, told apart by people who see colours differently (Okabe and Ito's set).
STAGE_COLORS = (
    (115, 158, 0),
    (0, 159, 230),
    (178, 114, 0),
    (167, 121, 204),
    (66, 228, 240),
    (0, 94, 213),
)
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_MIN_FONT_SCALE = 0.35  # Capitals of 8 px: below this they cannot be read.

# A rectangle of pixels: left, top, width, height.
Area = tuple[int, int, int, int]


def stage_color(stage: int) -> tuple[int, int, int]:
    """The BGR colour of the boxes that left after a stage; colours repeat after six."""
    return STAGE_COLORS[stage % len(STAGE_COLORS)]


def draw_detections(
    image_bgr: np.ndarray,
    detections: Detections,
    class_names: Sequence[str],
    *,
    score_threshold: float = 0.5,
) -> np.ndarray:
    """Draw boxes in the colour of their exit stage, labelled like ``cat 0.87 s1``.

    Args:
        image_bgr: uint8 ``[H, W, 3]``; not changed.
        detections: boxes in pixels of this image. May be empty.
        class_names: name of each class. Letters outside ASCII need OpenCV 5.
        score_threshold: detections with a lower score are not drawn.

    Returns:
        A new picture of the same size, with a legend of the stages in the corner that covers
        least of the boxes.
    """
    picture = np.ascontiguousarray(image_bgr).copy()
    shown = _lowest_score_first(detections.to("cpu"), score_threshold)
    if not len(shown):
        return picture
    boxes = _pixels(shown.boxes, picture.shape)
    stages = shown.exit_stages.tolist()
    colors = [stage_color(stage) for stage in stages]
    labels = [
        f"{class_names[class_index]} {score:.2f} s{stage}"
        for class_index, score, stage in zip(
            shown.classes.tolist(), shown.scores.tolist(), stages, strict=True
        )
    ]
    _draw_outlines(picture, boxes, colors)
    legend = _draw_legend(picture, sorted(set(stages)), boxes, _font_scale(picture))
    _draw_labels(picture, boxes, labels, colors, [legend])
    return picture


def draw_boxes(
    image_bgr: np.ndarray,
    boxes: Tensor,
    labels: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
) -> np.ndarray:
    """Draw labelled boxes, the last one on top.

    Args:
        image_bgr: uint8 ``[H, W, 3]``; not changed.
        boxes: ``[N, 4]``, XYXY in pixels of this image.
        labels: N texts; an empty one is not written.
        colors: N colours, BGR.

    Returns:
        A new picture of the same size.
    """
    picture = np.ascontiguousarray(image_bgr).copy()
    corners = _pixels(boxes, picture.shape)
    _draw_outlines(picture, corners, colors)
    _draw_labels(picture, corners, labels, colors, [])
    return picture


def caption(picture: np.ndarray, text: str, color: tuple[int, int, int]) -> np.ndarray:
    """A line of text on a BGR colour, ``[h, W, 3]``, as wide as the picture that it belongs to."""
    width = picture.shape[1]
    scale, _, height = _fit(text, _font_scale(picture), width)
    line = np.zeros((height + 4, width, 3), np.uint8)
    _write(line, text, (0, 0, width, height + 4), color, scale)
    return line


def _lowest_score_first(detections: Detections, score_threshold: float) -> Detections:
    order = detections.scores.argsort(descending=False, stable=True)
    return detections[order[detections.scores[order] >= score_threshold]]


def _pixels(boxes: Tensor, shape: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    corners = boxes.detach().round().long()
    corners[:, 0::2].clamp_(0, shape[1] - 1)
    corners[:, 1::2].clamp_(0, shape[0] - 1)
    return [(left, top, right, bottom) for left, top, right, bottom in corners.tolist()]


def _font_scale(picture: np.ndarray) -> float:
    return max(_MIN_FONT_SCALE, min(picture.shape[:2]) / 1400)


def _draw_outlines(
    picture: np.ndarray,
    boxes: Sequence[tuple[int, int, int, int]],
    colors: Sequence[tuple[int, int, int]],
) -> None:
    line = max(1, round(min(picture.shape[:2]) / 400))
    for (left, top, right, bottom), color in zip(boxes, colors, strict=True):
        cv2.rectangle(picture, (left, top), (right, bottom), color, line)


def _draw_labels(
    picture: np.ndarray,
    boxes: Sequence[tuple[int, int, int, int]],
    labels: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
    occupied: list[Area],
) -> None:
    """Write all labels; the last box, which has the best score, gets the first choice of place."""
    scale = _font_scale(picture)
    for box, label, color in reversed(list(zip(boxes, labels, colors, strict=True))):
        if label:
            occupied.append(_draw_label(picture, label, box, color, scale, occupied))


def _draw_label(
    picture: np.ndarray,
    text: str,
    box: tuple[int, int, int, int],
    color: tuple[int, int, int],
    scale: float,
    occupied: Sequence[Area],
) -> Area:
    """Write a label where it hides no other, if there is such a place; returns that place."""
    left, top, right, bottom = box
    scale, width, height = _fit(text, scale, picture.shape[1])
    candidates = [
        _move_inside((x, y, width, height), picture.shape)
        for y in (top - height, bottom + 1, top + 1, bottom - height)
        for x in (left, right - width + 1)
    ]
    area = min(candidates, key=lambda place: sum(_shared(place, other) for other in occupied))
    _write(picture, text, area, color, scale)
    return area


def _draw_legend(
    picture: np.ndarray,
    stages: Sequence[int],
    boxes: Sequence[tuple[int, int, int, int]],
    scale: float,
) -> Area:
    texts = [f"s{stage}: left after stage {stage}" for stage in stages]
    sizes = [_fit(text, scale, picture.shape[1]) for text in texts]
    scale = min(size[0] for size in sizes)
    width, height = max(size[1] for size in sizes), max(size[2] for size in sizes)
    total = height * len(texts)
    box_areas = [(x, y, right - x, bottom - y) for x, y, right, bottom in boxes]
    corners = [
        _move_inside((x, y, width, total), picture.shape)
        for y in (picture.shape[0], 0)
        for x in (0, picture.shape[1])
    ]
    left, top, _, _ = corner = min(
        corners, key=lambda place: sum(_shared(place, other) for other in box_areas)
    )
    for row, (stage, text) in enumerate(zip(stages, texts, strict=True)):
        _write(picture, text, (left, top + row * height, width, height), stage_color(stage), scale)
    return corner


def _fit(text: str, scale: float, most: int) -> tuple[float, int, int]:
    """Font scale, and width and height of the label in pixels, at most as wide as ``most``."""
    (width, height), baseline = cv2.getTextSize(text, _FONT, scale, _thickness(scale))
    # More than once: sizes come in whole pixels, so one division may not be enough.
    while width + 4 > most and scale > 0.05:
        scale *= 0.95
        (width, height), baseline = cv2.getTextSize(text, _FONT, scale, _thickness(scale))
    return scale, min(width + 4, most), height + baseline + 2


def _write(
    picture: np.ndarray, text: str, area: Area, color: tuple[int, int, int], scale: float
) -> None:
    left, top, width, height = area
    cv2.rectangle(picture, (left, top), (left + width - 1, top + height - 1), color, cv2.FILLED)
    _, baseline = cv2.getTextSize(text, _FONT, scale, _thickness(scale))
    blue, green, red = color
    # Black on light and white on dark grounds, by the luma of ITU-R BT.601.
    ink = (0, 0, 0) if 0.114 * blue + 0.587 * green + 0.299 * red > 110 else (255, 255, 255)
    cv2.putText(
        picture,
        text,
        (left + 2, top + height - baseline),
        _FONT,
        scale,
        ink,
        _thickness(scale),
        cv2.LINE_AA,
    )


def _thickness(scale: float) -> int:
    return max(1, round(1.4 * scale))


def _move_inside(area: Area, shape: tuple[int, ...]) -> Area:
    left, top, width, height = area
    left = max(0, min(left, shape[1] - width))
    return left, max(0, min(top, shape[0] - height)), width, height


def _shared(first: Area, second: Area) -> int:
    """Pixels that two areas have in common."""
    width = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0])
    height = min(first[1] + first[3], second[1] + second[3]) - max(first[1], second[1])
    return max(0, width) * max(0, height)
