"""Finds probable mistakes in a data set whose entries are all valid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from cascade_det.data.coco_json import CheckedJson, JsonObject
from cascade_det.data.issues import Issues, shown

_OUTSIDE = 1  # pixels; annotation tools round
# Boxes are probably (x1, y1, x2, y2) if at least this share fits the images when read so, and at
# least this share (and number) does not when read as (x, y, width, height). Hardly any true XYWH
# box leaves its image; corners read as XYWH leave it with a probability of about 3/4.
_FITTING, _UNFITTING, _FEWEST = 0.95, 0.25, 3
# The area of an object is at most that of its box, and seldom less than a quarter.
_BOX_AREAS_PER_AREA = (0.5, 4)


def find_mistakes(checked: CheckedJson) -> Issues:
    """Find entries that spoil training or metrics although they are valid.

    Boxes written as corners, areas without information, and categories with equal names.
    """
    warnings = Issues()
    _find_corners(checked, warnings)
    _find_useless_areas(checked, warnings)
    names = Counter(checked.categories.values())
    for category_id, name in checked.categories.items():
        if names[name] > 1:
            kind = "category that shares its name with another"
            warnings.add(kind, str, f"category {category_id} ({shown(name)})")
    return warnings


def boxes_of(checked: CheckedJson, image: JsonObject) -> Iterator[JsonObject]:
    """The annotations of an image with a non-empty box."""
    for annotation in checked.annotations.get(image["id"], []):
        if min(annotation["bbox"][2:]) > 0:
            yield annotation


def box_name(box: JsonObject) -> str:
    """An annotation with its ids, for messages."""
    return f"annotation {box['id']} (image {box['image_id']}, bbox {shown(box['bbox'])})"


def is_outside(box: JsonObject, image: JsonObject) -> bool:
    """Whether a box leaves its image by more than rounding explains."""
    left, top, width, height = box["bbox"]
    beyond = max(-left, -top, left + width - image["width"], top + height - image["height"])
    return bool(beyond > _OUTSIDE)


def _find_corners(checked: CheckedJson, warnings: Issues) -> None:
    boxes = fitting = 0
    unfitting: list[JsonObject] = []
    for image in checked.images.values():
        for box in boxes_of(checked, image):
            boxes += 1
            fitting += _fits_as_corners(box, image)
            if is_outside(box, image):
                unfitting.append(box)
    if len(unfitting) < max(_FEWEST, _UNFITTING * boxes) or fitting < _FITTING * boxes:
        return
    for box in unfitting:
        warnings.add(
            "box that leaves its image as (x, y, width, height), which COCO's format has: all fit "
            "as (x1, y1, x2, y2)",
            box_name,
            box,
        )


def _fits_as_corners(box: JsonObject, image: JsonObject) -> bool:
    x1, y1, x2, y2 = box["bbox"]
    beyond = max(x2 - image["width"], y2 - image["height"])
    return -_OUTSIDE <= x1 < x2 and -_OUTSIDE <= y1 < y2 and beyond <= _OUTSIDE


def _find_useless_areas(checked: CheckedJson, warnings: Issues) -> None:
    """Find values of ``area``, which AP by size depends on, that cannot be true."""
    boxes = [
        box
        for image in checked.images.values()
        for box in boxes_of(checked, image)
        if box.get("area") is not None
    ]
    areas = {box["area"] for box in boxes}
    same = len(boxes) > 1 and len(areas) == 1 and min(areas) >= 0
    if same and not all(map(_has_fitting_area, boxes)):
        kind = f"'area' that is {shown(*areas)} for all boxes: AP by size is meaningless"
        for box in boxes:
            warnings.add(kind, box_name, box)
        return
    for box in boxes:
        if box["area"] < 0:
            warnings.add("'area' below 0: an evaluation ignores the object", _area_name, box)
        elif box["area"] == 0:
            warnings.add("'area' of 0: the object counts as small in AP by size", _area_name, box)


def _has_fitting_area(box: JsonObject) -> bool:
    _, _, width, height = box["bbox"]
    least, most = _BOX_AREAS_PER_AREA
    return box["area"] > 0 and least <= width * height / box["area"] <= most


def _area_name(box: JsonObject) -> str:
    return f"{box_name(box)[:-1]}, area {shown(box['area'])})"
