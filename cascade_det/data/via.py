"""What the COCO export of VIA, the VGG Image Annotator, has of its own.

Some versions of VIA 2 write the ids of images as text, and the only polygon of an object without a
list around it. Others write null for a class whose option is no number, if the names of all images
begin with a digit; with one class it is known which is meant.
"""

from __future__ import annotations

from array import array
from typing import Any

_DESCRIPTION = "VIA project exported to COCO format"
_LONGEST_ID = 18  # digits of what fits into 64 bits


def repair_via(content: dict[str, Any]) -> None:
    """Turn ids and polygons of a VIA export into those of COCO; any other json stays as it is.

    What cannot be repaired stays for the checks of a COCO json.

    Args:
        content: of the json; changed in place.
    """
    info = content.get("info")
    if not isinstance(info, dict) or not str(info.get("description")).startswith(_DESCRIPTION):
        return
    images, categories, annotations = (
        _objects(content.get(key)) for key in ("images", "categories", "annotations")
    )
    if len(categories) == 1 and categories[0].get("id", 0) is None:
        for entry, key in [(categories[0], "id"), *((a, "category_id") for a in annotations)]:
            if entry.get(key, 0) is None:
                entry[key] = 1
    for entry in (*images, *categories, *annotations):
        for key in ("id", "image_id", "category_id"):
            if key in entry:
                entry[key] = _number(entry[key])
    for entry in annotations:
        polygon = entry.get("segmentation")
        if isinstance(polygon, list) and polygon and all(type(x) in (int, float) for x in polygon):
            entry["segmentation"] = [array("d", polygon)]


def _objects(entries: Any) -> list[dict[str, Any]]:
    entries = entries if isinstance(entries, list) else []
    return [entry for entry in entries if isinstance(entry, dict)]


def _number(value: Any) -> Any:
    """A number for its text; anything else, "01" included, stays as it is."""
    is_text = isinstance(value, str) and value.isascii() and value.isdecimal()
    if is_text and len(value) <= _LONGEST_ID and str(int(value)) == value:
        return int(value)
    return value
