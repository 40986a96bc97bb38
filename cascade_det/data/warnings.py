"""What in a checked data set is probably a mistake, though each entry is valid by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from cascade_det.data.coco_json import CheckedJson, JsonObject
from cascade_det.data.issues import Issues, shown

_OUTSIDE = 1  # pixels; annotation tools round
# Of the boxes, for taking all of them for (x1, y1, x2, y2): so many fit their image in that way,
# and so many do not in the other. Of true (x, y, width, height) hardly any leaves its image, while
# of a box anywhere in an image the chance that twice its centre does is about 3 in 4.
_FITTING, _UNFITTING, _FEWEST = 0.95, 0.25, 3
# The area of an object is at most that of its box, and seldom less than a quarter.
_BOX_AREAS_PER_AREA = (0.5, 4)


def find_mistakes(checked: CheckedJson) -> Issues:
    """Note what spoils training or figures without being wrong in any entry.

    Boxes that are corners, areas that say nothing, and names that two categories share.
    """
    notes = Issues()
    _note_corners(checked, notes)
    _note_areas(checked, notes)
    names = Counter(checked.categories.values())
    for category_id, name in checked.categories.items():
        if names[name] > 1:
            notes.add(
                "category that has its name with another",
                "category {} ({})".format,
                *(category_id, shown(name)),
            )
    return notes


def boxes_of(checked: CheckedJson, image: JsonObject) -> Iterator[JsonObject]:
    """The annotations of an image whose box is not empty."""
    for annotation in checked.annotations.get(image["id"], []):
        if min(annotation["bbox"][2:]) > 0:
            yield annotation


def box_name(box: JsonObject) -> str:
    """An annotation as a user can find it."""
    return f"annotation {box['id']} (image {box['image_id']}, bbox {shown(box['bbox'])})"


def is_outside(box: JsonObject, image: JsonObject) -> bool:
    """Whether a box reaches further beyond its image than rounding explains."""
    left, top, width, height = box["bbox"]
    beyond = max(-left, -top, left + width - image["width"], top + height - image["height"])
    return bool(beyond > _OUTSIDE)


def _note_corners(checked: CheckedJson, notes: Issues) -> None:
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
        notes.add(
            "box that leaves its image as (x, y, width, height), which COCO's format has: all fit "
            "as (x1, y1, x2, y2)",
            box_name,
            box,
        )


def _fits_as_corners(box: JsonObject, image: JsonObject) -> bool:
    x1, y1, x2, y2 = box["bbox"]
    beyond = max(x2 - image["width"], y2 - image["height"])
    return -_OUTSIDE <= x1 < x2 and -_OUTSIDE <= y1 < y2 and beyond <= _OUTSIDE


def _note_areas(checked: CheckedJson, notes: Issues) -> None:
    """An evaluation takes an object for small, medium or large by its ``area``."""
    boxes = [
        box
        for image in checked.images.values()
        for box in boxes_of(checked, image)
        if box.get("area") is not None
    ]
    areas = {box["area"] for box in boxes}
    same = len(boxes) > 1 and len(areas) == 1 and min(areas) >= 0
    if same and not all(map(_has_fitting_area, boxes)):
        kind = f"'area' that is {shown(*areas)} for all boxes: AP by size says nothing"
        for box in boxes:
            notes.add(kind, box_name, box)
        return
    for box in boxes:
        if box["area"] < 0:
            notes.add("'area' below 0: an evaluation ignores the object", _area_name, box)
        elif box["area"] == 0:
            notes.add("'area' of 0: the object counts as small in AP by size", _area_name, box)


def _has_fitting_area(box: JsonObject) -> bool:
    _, _, width, height = box["bbox"]
    least, most = _BOX_AREAS_PER_AREA
    return box["area"] > 0 and least <= width * height / box["area"] <= most


def _area_name(box: JsonObject) -> str:
    return f"{box_name(box)[:-1]}, area {shown(box['area'])})"
