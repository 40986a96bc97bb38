"""Drawing detections and other boxes into an image, without PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from cascade_det.masks.pasting import paste_in_box
from cascade_det.report.colors import Color, class_color
from cascade_det.report.mask_drawing import line_width, paint_masks
from cascade_det.report.tile_drawing import TILE_KINDS, DrawableTiles, paint_tiles
from cascade_det.text import printable

_WHITE, _BLACK = (255, 255, 255), (0, 0, 0)
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_MIN_FONT_SCALE = 0.35  # Capitals of 8 px, the smallest legible ones.
_LONGEST_TEXT = 80  # Characters of a class or file name; a label is no wider than its picture.
_GAP = 2  # Pixels between the texts of a legend.
_LONGEST_JPEG_SIDE = 65_500  # The limit of libjpeg.

# A rectangle of pixels: left, top, width, height.
Area = tuple[int, int, int, int]


class DrawableDetections(Protocol):
    """What ``core.structures.Detections`` and ``onnx_predictor.ArrayDetections`` share.

    Attributes:
        boxes: ``[D, 4]``, XYXY in pixels.
        scores: ``[D]``.
        classes: ``[D]``.
        exit_stages: ``[D]``.
        masks: ``[D, M, M]`` or ``None``.
    """

    boxes: Any
    scores: Any
    classes: Any
    exit_stages: Any
    masks: Any


def draw_detections(
    image_bgr: npt.NDArray[np.uint8],
    detections: DrawableDetections,
    class_names: Sequence[str],
    *,
    score_threshold: float = 0.5,
    with_stages: bool = False,
    track_ids: Sequence[int | None] | None = None,
    tiles: DrawableTiles | None = None,
) -> npt.NDArray[np.uint8]:
    r"""Draw boxes in the colour of their class, labelled like ``cat 0.87``.

    With masks, every detection has a colour of its own, for its mask, box and label.

    Args:
        image_bgr: uint8 ``[H, W, 3]``; not changed.
        detections: tensors or arrays, boxes in pixels of this image. May be empty.
        class_names: name of each class. Characters missing from OpenCV's font are written as
            ``\u0e41``; OpenCV 4 has ASCII only.
        score_threshold: the lowest score that is drawn.
        with_stages: add the exit stage to the labels, ``cat 0.87 s1``, and a legend of the stages
            that occur, in the corner that covers least of the boxes.
        track_ids: numbers of the objects, ``cat 0.87 #3``; ``None`` for an object without one.
        tiles: below the boxes, with lines in the legend; see ``paint_tiles``.

    Returns:
        A new picture of the same size.
    """
    scores = _array(detections.scores)
    order = np.argsort(scores, kind="stable")
    order = order[scores[order] >= score_threshold]
    classes = _array(detections.classes)[order].tolist()
    labels = [
        f"{_shortened(class_names[index])} {score:.2f}"
        for index, score in zip(classes, scores[order].tolist(), strict=True)
    ]
    stages: list[int] = []
    if with_stages:
        stages = _array(detections.exit_stages)[order].tolist()
        labels = [f"{label} s{stage}" for label, stage in zip(labels, stages, strict=True)]
    if track_ids is not None:
        numbers = [track_ids[row] for row in order.tolist()]
        tags = ["" if number is None else f" #{number}" for number in numbers]
        labels = [label + tag for label, tag in zip(labels, tags, strict=True)]
    picture = np.ascontiguousarray(image_bgr).copy()
    legend = [(f"s{stage}: left after stage {stage}", _WHITE) for stage in sorted(set(stages))]
    if tiles is not None:
        paint_tiles(picture, tiles)
        legend += TILE_KINDS.items()
    boxes, colors = _array(detections.boxes)[order], [class_color(index) for index in classes]
    if detections.masks is not None:
        # The best detections have the most distinct colours.
        colors = [class_color(rank) for rank in reversed(range(len(order)))]
        _paint_masks(picture, boxes, _array(detections.masks)[order], colors)
    _draw(picture, boxes, labels, colors, legend)
    return picture


def draw_boxes(
    image_bgr: npt.NDArray[np.uint8],
    boxes: Any,
    labels: Sequence[str],
    colors: Sequence[Color],
) -> npt.NDArray[np.uint8]:
    """Draw labelled boxes, the last one on top.

    Args:
        image_bgr: uint8 ``[H, W, 3]``; not changed.
        boxes: tensor or array ``[N, 4]``, XYXY in pixels of this image.
        labels: N texts; an empty one is not written.
        colors: N colours, BGR.

    Returns:
        A new picture of the same size.
    """
    picture = np.ascontiguousarray(image_bgr).copy()
    _draw(picture, _array(boxes), [_shortened(label) for label in labels], colors, [])
    return picture


def caption(picture: npt.NDArray[np.uint8], text: str, color: Color) -> npt.NDArray[np.uint8]:
    """A line of text on a BGR colour, ``[h, W, 3]``, as wide as the picture."""
    width = picture.shape[1]
    scale, _, height = _fit(text, _font_scale(picture), width)
    line = np.zeros((height + 4, width, 3), np.uint8)
    _write(line, text, (0, 0, width, height + 4), color, scale)
    return line


def legend(
    picture: npt.NDArray[np.uint8], texts: Sequence[str], colors: Sequence[Color]
) -> npt.NDArray[np.uint8]:
    """N texts on their BGR colours, line by line, ``[h, W, 3]``, as wide as the picture."""
    most, scale = picture.shape[1], _font_scale(picture)
    places: list[tuple[str, float, Area]] = []
    left = top = 0
    for text in map(_shortened, texts):
        own_scale, width, height = _fit(text, scale, most)
        if left + width > most:
            left, top = 0, max(y + h for _, _, (_, y, _, h) in places) + _GAP
        places.append((text, own_scale, (left, top, width, height)))
        left += width + _GAP
    bottom = max((y + height for _, _, (_, y, _, height) in places), default=0)
    lines = np.full((bottom, most, 3), _WHITE, np.uint8)
    for (text, own_scale, area), color in zip(places, colors, strict=True):
        _write(lines, text, area, color, own_scale)
    return lines


def encode(picture: npt.NDArray[Any], suffix: str) -> bytes:
    """Encode a picture as an image file.

    Args:
        picture: uint8 ``[H, W, 3]``, BGR; or, as ``".png"``, of one channel ``[H, W]``, uint8 or
            uint16.
        suffix: ``".jpg"`` or ``".png"``.

    Raises:
        ValueError: the picture is empty, or too large for the format.
    """
    height, width = picture.shape[:2]
    too_large = suffix == ".jpg" and max(height, width) > _LONGEST_JPEG_SIDE
    # imencode() would print to stderr.
    done, content = (
        (False, None) if too_large or 0 in (height, width) else cv2.imencode(suffix, picture)
    )
    if not done or content is None:
        raise ValueError(f"a picture of {width:,} x {height:,} px cannot be written as {suffix}")
    encoded: bytes = content.tobytes()
    return encoded


def _array(values: Any) -> npt.NDArray[Any]:
    """A tensor on any device, or an array, as an array."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _pixels(boxes: npt.NDArray[Any], shape: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    most = np.array([shape[1], shape[0], shape[1], shape[0]]) - 1
    corners = np.clip(np.rint(boxes), 0, most).astype(np.int64)
    return [(left, top, right, bottom) for left, top, right, bottom in corners.tolist()]


def _font_scale(picture: npt.NDArray[np.uint8]) -> float:
    return max(_MIN_FONT_SCALE, min(picture.shape[:2]) / 1400)


def _shortened(text: str) -> str:
    return printable(text, longest=_LONGEST_TEXT)


def _paint_masks(
    picture: npt.NDArray[np.uint8],
    boxes: npt.NDArray[Any],
    masks: npt.NDArray[Any],
    colors: Sequence[Color],
) -> None:
    """Paint the masks ``[D, M, M]`` of boxes, those of small boxes on top."""
    height, width = picture.shape[:2]
    order = np.argsort(-np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), kind="stable").tolist()
    placed = (paste_in_box(masks[i], boxes[i], height, width) for i in order)
    paint_masks(picture, placed, [colors[i] for i in order])


def _draw(
    picture: npt.NDArray[np.uint8],
    boxes: npt.NDArray[Any],
    labels: Sequence[str],
    colors: Sequence[Color],
    legend: Sequence[tuple[str, Color]],
) -> None:
    """Draw boxes, their labels that are not empty, and a legend of texts on colours, if any."""
    corners = _pixels(boxes, picture.shape)
    line = line_width(picture)
    for (left, top, right, bottom), color in zip(corners, colors, strict=True):
        cv2.rectangle(picture, (left, top), (right, bottom), color, line)
    # Pixels of labels. Comparing labels in pairs would be slow with thousands of them.
    taken = np.zeros(picture.shape[:2], bool)
    scale = _font_scale(picture)
    if legend:
        _part(taken, _draw_legend(picture, legend, corners, scale))[:] = True
    # The last box, which has the best score, chooses its place first.
    for box, label, color in reversed(list(zip(corners, labels, colors, strict=True))):
        if label:
            _part(taken, _draw_label(picture, label, box, color, scale, taken))[:] = True


def _draw_label(
    picture: npt.NDArray[np.uint8],
    text: str,
    box: tuple[int, int, int, int],
    color: Color,
    scale: float,
    taken: npt.NDArray[np.bool_],
) -> Area:
    """Write a label where it hides least of other labels; returns its area."""
    left, top, right, bottom = box
    scale, width, height = _fit(text, scale, picture.shape[1])
    candidates = [
        _move_inside((x, y, width, height), picture.shape)
        for y in (top - height, bottom + 1, top + 1, bottom - height)
        for x in (left, right - width + 1)
    ]
    area = min(candidates, key=lambda place: np.count_nonzero(_part(taken, place)))
    _write(picture, text, area, color, scale)
    return area


def _draw_legend(
    picture: npt.NDArray[np.uint8],
    entries: Sequence[tuple[str, Color]],
    boxes: Sequence[tuple[int, int, int, int]],
    scale: float,
) -> Area:
    sizes = [_fit(text, scale, picture.shape[1]) for text, _ in entries]
    scale = min(size[0] for size in sizes)
    width, height = max(size[1] for size in sizes), max(size[2] for size in sizes)
    total = height * len(entries)
    box_areas = [(x, y, right - x, bottom - y) for x, y, right, bottom in boxes]
    corners = [
        _move_inside((x, y, width, total), picture.shape)
        for y in (picture.shape[0], 0)
        for x in (0, picture.shape[1])
    ]
    left, top, _, _ = corner = min(
        corners, key=lambda place: sum(_shared(place, other) for other in box_areas)
    )
    for row, (text, color) in enumerate(entries):
        _write(picture, text, (left, top + row * height, width, height), color, scale)
    return corner


def _fit(text: str, scale: float, most: int) -> tuple[float, int, int]:
    """Font scale, width and height in pixels of a label that is at most ``most`` wide."""
    width, height, baseline = _text_size(text, scale)
    # In a loop: sizes are rounded to pixels.
    while width + 4 > most and scale > 0.05:
        scale *= 0.95
        width, height, baseline = _text_size(text, scale)
    return scale, min(width + 4, most), height + baseline + 2


def _write(
    picture: npt.NDArray[np.uint8], text: str, area: Area, color: Color, scale: float
) -> None:
    left, top, width, height = area
    cv2.rectangle(picture, (left, top), (left + width - 1, top + height - 1), color, cv2.FILLED)
    _, _, baseline = _text_size(text, scale)
    blue, green, red = color
    # Black on light and white on dark colours, by the luma of ITU-R BT.601.
    ink = _BLACK if 0.114 * blue + 0.587 * green + 0.299 * red > 110 else _WHITE
    origin = (left + 2, top + height - baseline)
    thickness = _thickness(scale)
    cv2.putText(picture, _drawable(text), origin, _FONT, scale, ink, thickness, cv2.LINE_AA)


def _text_size(text: str, scale: float) -> tuple[int, int, int]:
    """Width, height above the baseline, and depth below it, in pixels."""
    size, baseline = cv2.getTextSize(_drawable(text), _FONT, scale, _thickness(scale))
    return size[0], size[1], baseline


def _drawable(text: str) -> str:
    """The text with escapes for characters that OpenCV would draw as question marks.

    Lone surrogates, as in file names that are not UTF-8, would crash OpenCV 5.0.
    """
    return "".join(_drawable_character(character) for character in printable(text))


@functools.lru_cache(maxsize=4096)
def _drawable_character(character: str) -> str:
    if character.isascii():
        return character
    # OpenCV 4 has one question mark for each byte of UTF-8, OpenCV 5 one for a character.
    unknown = ("?", "?" * len(character.encode()))
    if any((_drawn(character) == _drawn(marks)).all() for marks in unknown):
        return character.encode("unicode_escape").decode()
    return character


def _drawn(text: str) -> npt.NDArray[np.uint8]:
    picture = np.zeros((60, 160), np.uint8)
    cv2.putText(picture, text, (10, 40), _FONT, 1.0, _WHITE, 1)
    return picture


def _thickness(scale: float) -> int:
    return max(1, round(1.4 * scale))


def _move_inside(area: Area, shape: tuple[int, ...]) -> Area:
    left, top, width, height = area
    left = max(0, min(left, shape[1] - width))
    return left, max(0, min(top, shape[0] - height)), width, height


def _part(picture: npt.NDArray[Any], area: Area) -> npt.NDArray[Any]:
    left, top, width, height = area
    return picture[top : top + height, left : left + width]


def _shared(first: Area, second: Area) -> int:
    """Number of pixels in both areas."""
    width = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0])
    height = min(first[1] + first[3], second[1] + second[3]) - max(first[1], second[1])
    return max(0, width) * max(0, height)
