"""Summarises a checked data set: statistics, and warnings about unusual entries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from cascade_det.data.coco_json import CheckedJson, JsonObject
from cascade_det.data.issues import Issues, shown
from cascade_det.data.warnings import box_name, boxes_of, find_mistakes, is_outside
from cascade_det.masks.polygons import crosses_itself, is_outside_image

# COCO's limits between small, medium and large, in square pixels.
_AREA_LIMITS = (32**2, 96**2)
_TINY_SIDE = 2  # pixels


@dataclass
class DatasetSummary:
    """Statistics of the usable part of a data set.

    Attributes:
        images: number of images.
        images_with_boxes: number of images with a box that is not a crowd.
        boxes: number of boxes, crowds included, empty boxes excluded.
        crowds: number of boxes that are crowds.
        sizes: number of images by (width, height).
        areas: number of small, medium and large boxes, by COCO's limits.
        category_boxes: number of boxes by category id, in the order of the ids; may be 0.
        category_images: number of images by category id.
        masks: number of boxes by the kind of their mask; empty if masks were not read.
        warnings: unusual entries.
    """

    images: int = 0
    images_with_boxes: int = 0
    boxes: int = 0
    crowds: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    areas: Counter[str] = field(default_factory=Counter)
    category_boxes: Counter[int] = field(default_factory=Counter)
    category_images: Counter[int] = field(default_factory=Counter)
    masks: Counter[str] = field(default_factory=Counter)
    warnings: Issues = field(default_factory=Issues)


def summarize(checked: CheckedJson) -> DatasetSummary:
    """Count the usable entries of a data set, and collect warnings."""
    summary = DatasetSummary(warnings=checked.of_no_area.copy())
    summary.warnings.update(checked.odd_masks)
    summary.warnings.update(checked.odd_labels)
    if checked.with_masks:
        summary.masks.update(dict.fromkeys(("polygons", "RLE", "none"), 0))
    summary.category_boxes.update(dict.fromkeys(checked.categories, 0))
    if not checked.has_annotations:
        kind = "data set without annotations"
        summary.warnings.add(kind, str, "can be used for inference, not for training")
    for image in checked.images.values():
        boxes = list(boxes_of(checked, image))
        _count_image(image, boxes, checked.has_annotations, summary)
        if checked.with_masks:
            _count_masks(image, boxes, summary)
    summary.warnings.update(find_mistakes(checked))
    _find_shared_files(checked, summary.warnings)
    _find_category_gaps(checked, summary)
    return summary


def _count_image(
    image: JsonObject, boxes: list[JsonObject], annotated: bool, summary: DatasetSummary
) -> None:
    summary.images += 1
    summary.sizes[image["width"], image["height"]] += 1
    crowds = sum(bool(box.get("iscrowd", 0)) for box in boxes)
    summary.boxes += len(boxes)
    summary.crowds += crowds
    if len(boxes) > crowds:
        summary.images_with_boxes += 1
    elif annotated:
        summary.warnings.add("image without a box that is not a crowd", _image_name, image)
    for category_id, count in Counter(box["category_id"] for box in boxes).items():
        summary.category_boxes[category_id] += count
        summary.category_images[category_id] += 1
    seen = set()
    for box in boxes:
        summary.areas[_size_class(box)] += 1
        key = (box["category_id"], *box["bbox"])
        for kind in _oddities(box, image, key in seen):
            summary.warnings.add(kind, box_name, box)
        seen.add(key)


def _count_masks(image: JsonObject, boxes: list[JsonObject], summary: DatasetSummary) -> None:
    kinds: dict[type, str] = {list: "polygons", dict: "RLE", type(None): "none"}
    for box in boxes:
        mask = box.get("segmentation")
        summary.masks[kinds[type(mask)]] += 1
        if not isinstance(mask, list):
            continue
        if any(map(crosses_itself, mask)):
            kind = "polygon that crosses itself (and is filled by the even-odd rule)"
            summary.warnings.add(kind, box_name, box)
        if is_outside_image(mask, image["height"], image["width"]):
            summary.warnings.add("mask outside its image", box_name, box)


def _size_class(box: JsonObject) -> str:
    _, _, width, height = box["bbox"]
    small, medium = _AREA_LIMITS
    area = width * height
    return "small" if area < small else "medium" if area < medium else "large"


def _oddities(box: JsonObject, image: JsonObject, repeated: bool) -> Iterator[str]:
    if min(box["bbox"][2:]) < _TINY_SIDE:
        yield f"box with a side below {_TINY_SIDE} pixels"
    if is_outside(box, image):
        yield "box that is partly outside its image (and is clipped)"
    if repeated:
        yield "duplicate box of the same class"


def _find_shared_files(checked: CheckedJson, warnings: Issues) -> None:
    users = Counter(image["file_name"] for image in checked.images.values())
    for name, count in users.items():
        if count > 1:
            warnings.add("file used by several images", shown, name)


def _find_category_gaps(checked: CheckedJson, summary: DatasetSummary) -> None:
    for category_id, name in checked.categories.items():
        if checked.has_annotations and not summary.category_boxes[category_id]:
            summary.warnings.add("category without a box", shown, name)
    for one, other in pairwise(checked.categories):
        if other > one + 1:
            summary.warnings.add("gap in the ids of categories", str, f"{one} to {other}")


def _image_name(image: JsonObject) -> str:
    return f"image {image['id']} ({shown(image['file_name'])})"
