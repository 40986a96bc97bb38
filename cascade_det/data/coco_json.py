"""Checks the content of a COCO-format json, or of another format that was read as one.

The json is not read through ``pycocotools.coco.COCO``: that class indexes by id, so duplicate ids
vanish before they can be reported, and other bad data end in a KeyError.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any

from cascade_det.data.annotation_formats import read_annotations
from cascade_det.data.catalog import DatasetSource
from cascade_det.data.image_names import NEAR_LINKS, LinkRule, name_guard
from cascade_det.data.issues import Issues, shown
from cascade_det.masks.segmentation import parse_segmentation
from cascade_det.text import check_name

JsonObject = dict[str, Any]

# Beyond any image, and far below the largest float32.
_COORDINATE_LIMIT = 1e9
_ID_LIMIT = 2**63  # other programs hold ids in int64

# Keys shown in a message.
# ``label`` is the file and line of other formats.
_ANNOTATION_KEYS = ("label", "image_id", "category_id", "bbox")
_IMAGE_KEYS = ("file_name", "width", "height")


@dataclass
class CheckedJson:
    """The usable entries of a json, and the issues of all others.

    Attributes:
        images: by image id, ascending.
        image_ids: of all images, bad ones included.
        annotations: by image id, in the order of the json; those of ``of_no_area`` included. Their
            ``segmentation``, if it was read, is a checked mask, and absent if there is none.
        has_annotations: whether the json has the key ``annotations``.
        with_masks: whether masks were read.
        categories: names by category id, ascending.
        frequencies: by category id, of those that have one: LVIS' ``r``, ``c`` or ``f``.
        unusable: issues of the whole file: its structure, or its categories.
        bad: images and annotations that are wrong, and left out.
        of_no_area: annotations with an empty box: an evaluation counts them, training does not.
        odd_masks: what is odd about masks that may be used.
        odd_labels: what is probably a mistake in label files of another format.
    """

    images: dict[int, JsonObject] = field(default_factory=dict)
    image_ids: set[Any] = field(default_factory=set)
    annotations: dict[int, list[JsonObject]] = field(default_factory=dict)
    has_annotations: bool = False
    with_masks: bool = False
    categories: dict[int, str] = field(default_factory=dict)
    frequencies: dict[int, str] = field(default_factory=dict)
    unusable: Issues = field(default_factory=Issues)
    bad: Issues = field(default_factory=Issues)
    of_no_area: Issues = field(default_factory=Issues)
    odd_masks: Issues = field(default_factory=Issues)
    odd_labels: Issues = field(default_factory=Issues)


def check_coco_json(
    source: DatasetSource, links: LinkRule = NEAR_LINKS, *, masks: bool = False
) -> CheckedJson:
    """Read a json and check every image, category and annotation in it, but no image file.

    Args:
        source: a json in COCO format, where ``annotations`` may be absent, or annotations of
            another format; and the folder that no file name may leave.
        links: which links may leave it.
        masks: whether to read and check masks.

    Raises:
        DatasetError: the file cannot be read, is not json, or has no object at the top level.
    """
    labels = read_annotations(source, links, masks=masks)
    content = labels.content
    checked = CheckedJson(has_annotations="annotations" in content, with_masks=masks)
    checked.bad, checked.odd_labels = labels.bad, labels.odd
    categories = _entries(content, "categories", checked, checked.unusable)
    _check_categories(categories, checked)
    # If categories are wrong or missing, every category_id would be unknown.
    category_ids = _Everything() if checked.unusable else checked.categories
    images = _entries(content, "images", checked, checked.bad)
    _check_images(images, name_guard(source, links), checked)
    if checked.has_annotations:
        _check_annotations(
            _entries(content, "annotations", checked, checked.bad),
            # Bad images included, so that their annotations are not reported as well.
            checked.image_ids if isinstance(content.get("images"), list) else _Everything(),
            category_ids,
            # COCO's 2014 minival files repeat ids; Detectron2 accepts them, and so do we.
            ids_may_repeat="minival" in source.json_file.name,
            checked=checked,
        )
    return checked


class _Everything(Container[object]):
    """A collection that contains every id, for ids that cannot be looked up."""

    def __contains__(self, _: object) -> bool:
        return True


def _entries(
    content: JsonObject, key: str, checked: CheckedJson, issues: Issues
) -> list[JsonObject]:
    """The objects in the list under a top-level key."""
    entries = content.get(key)
    if not isinstance(entries, list):
        how = "is not a list" if key in content else "is missing"
        checked.unusable.add("key that COCO format requires", str, f"{key!r} {how}")
        return []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            issues.add(f"entry of {key!r} that is not an object", str, f"{key}[{index}]")
    return [entry for entry in entries if isinstance(entry, dict)]


def _check_categories(entries: list[JsonObject], checked: CheckedJson) -> None:
    """Fill in the categories. All must be right: leaving one out would renumber the rest."""
    counts = Counter(_plain_id(entry.get("id")) for entry in entries)
    for entry in entries:
        if issue := _id_issue(entry, "category", counts):
            checked.unusable.add(issue, _describe, "category", entry, ("name",))
            continue
        try:
            checked.categories[entry["id"]] = check_name(entry.get("name"))
        except ValueError as error:
            kind = "category without a usable 'name'"
            checked.unusable.add(kind, str, f"category {entry['id']}: {error}")
        if entry.get("frequency") in ("r", "c", "f"):
            checked.frequencies[entry["id"]] = entry["frequency"]
    if not entries and not checked.unusable:
        checked.unusable.add("empty list of classes", str, "'categories'")
    checked.categories = dict(sorted(checked.categories.items()))


def _check_images(
    entries: list[JsonObject],
    find_escape: Callable[[str], tuple[str, str] | None],
    checked: CheckedJson,
) -> None:
    """Fill in the images, except those with a shared id, whose boxes would be ambiguous."""
    counts = Counter(_plain_id(entry.get("id")) for entry in entries)
    for entry in entries:
        detail = ""
        issue = _id_issue(entry, "image", counts) or _file_name_issue(entry)
        if not issue and (escape := find_escape(entry["file_name"])):
            issue, detail = escape
        issue = issue or _size_issue(entry)
        if issue:
            checked.bad.add(issue, _describe, "image", entry, _IMAGE_KEYS, detail)
        else:
            checked.images[entry["id"]] = entry
    checked.images = dict(sorted(checked.images.items()))
    checked.image_ids = set(counts)


def _check_annotations(
    entries: list[JsonObject],
    image_ids: Container[object],
    category_ids: Container[object],
    *,
    ids_may_repeat: bool,
    checked: CheckedJson,
) -> None:
    by_image: dict[int, list[JsonObject]] = defaultdict(list)
    ids: set[int] = set()
    for entry in entries:
        issue = _annotation_issue(entry, image_ids, category_ids)
        image = None if issue else checked.images.get(entry["image_id"])
        issue = issue or _box_issue(entry.get("bbox"), image)
        if not issue and entry["id"] in ids and not ids_may_repeat:
            issue = "annotation that shares its id with another"
        if checked.with_masks and image and not issue:
            issue = _check_mask(entry, image, checked.odd_masks)
        if issue:
            checked.bad.add(issue, _describe, "annotation", entry, _ANNOTATION_KEYS)
            continue
        ids.add(entry["id"])
        if min(entry["bbox"][2:]) == 0:
            kind = "box of zero width or height"
            checked.of_no_area.add(kind, _describe, "annotation", entry, _ANNOTATION_KEYS)
        by_image[entry["image_id"]].append(entry)
    checked.annotations = by_image


def _check_mask(entry: JsonObject, image: JsonObject, odd: Issues) -> str | None:
    """Replace ``segmentation`` of an annotation by its mask, or return what is wrong with it."""

    def note(kind: str) -> None:
        odd.add(kind, _describe, "annotation", entry, _ANNOTATION_KEYS)

    value = entry.pop("segmentation", None)
    try:
        mask = parse_segmentation(value, image["height"], image["width"], note)
    except ValueError as error:
        return str(error)
    if mask is not None:
        entry["segmentation"] = mask
    return None


# -- ids ------------------------------------------------------------------------------------------


def _plain_id(value: object) -> int | str | None:
    """An id to look up; ``None`` if it cannot be one.

    A str is not a valid id, but links the annotations of an image to it. So does a float, as its
    text: as a number, 1.0 would be found as 1.
    """
    if isinstance(value, float):
        return repr(value)
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def _id_issue(entry: JsonObject, what: str, counts: Counter[Any]) -> str | None:
    if issue := _integer_issue(what, entry, "id"):
        return issue
    return f"{what} that shares its id with another" if counts[entry["id"]] > 1 else None


def _integer_issue(what: str, entry: JsonObject, key: str) -> str | None:
    value = entry.get(key)
    if type(value) is int:
        fits = -_ID_LIMIT <= value < _ID_LIMIT
        return None if fits else f"{what} whose {key!r} is beyond 64 bits"
    if isinstance(value, float):
        return f"{what} whose {key!r} is a float, not an integer (1, not 1.0)"
    if isinstance(value, str):
        return f'{what} whose {key!r} is text, not an integer (1, not "1")'
    return f"{what} without an integer {key!r}"


def _describe(what: str, entry: JsonObject, keys: tuple[str, ...], detail: str = "") -> str:
    facts = ", ".join(f"{key} {shown(entry[key])}" for key in keys if key in entry)
    described = f"{what} {shown(entry.get('id'))} ({facts})"
    return f"{described}: {detail}" if detail else described


# -- images ---------------------------------------------------------------------------------------


def _file_name_issue(image: JsonObject) -> str | None:
    return None if _is_path(image.get("file_name")) else "image without a usable 'file_name'"


def _size_issue(image: JsonObject) -> str | None:
    for side in ("height", "width"):
        if issue := _integer_issue("image", image, side):
            return issue
        if image[side] <= 0:
            return f"image whose {side!r} is not above 0"
    return None


def _is_path(value: object) -> bool:
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:  # half of a surrogate pair, which json can contain
        return False
    return True


# -- annotations ----------------------------------------------------------------------------------


def _annotation_issue(
    annotation: JsonObject, image_ids: Container[object], category_ids: Container[object]
) -> str | None:
    issue = (
        _integer_issue("annotation", annotation, "id")
        or _reference_issue(annotation, "image", image_ids)
        or _reference_issue(annotation, "category", category_ids)
    )
    if issue:
        return issue
    if annotation.get("iscrowd", 0) not in (0, 1):
        return "annotation whose 'iscrowd' is neither 0 nor 1"
    if annotation.get("ignore", 0) != 0:
        return "annotation with 'ignore', which is not supported (use 'iscrowd')"
    if annotation.get("area") is not None and not _is_coordinate(annotation["area"]):
        return "annotation whose 'area' is not a finite number"
    return None


def _reference_issue(annotation: JsonObject, what: str, ids: Container[object]) -> str | None:
    """The issue with an annotation's image or category id.

    A bad image or category is reported itself; ``ids`` has its id, of whatever type.
    """
    value = annotation.get(f"{what}_id")
    looked_up = _plain_id(value)
    if looked_up is not None and looked_up in ids:
        return None
    is_meant = (isinstance(value, float) and value.is_integer() and int(value) in ids) or (
        isinstance(value, str) and value.isdecimal() and len(value) < 20 and int(value) in ids
    )
    if is_meant:
        return _integer_issue("annotation", annotation, f"{what}_id")
    return f"annotation of an unknown {what}"


def _box_issue(box: Any, image: JsonObject | None) -> str | None:
    """The issue with a box in COCO's XYWH; the image is ``None`` if it is bad itself."""
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_coordinate, box)):
        return "box that is not four finite numbers"
    left, top, width, height = box
    if min(width, height) < 0:
        return "box of negative width or height"
    if image is None or min(width, height) == 0:
        return None
    inside = (
        left < image["width"] and top < image["height"] and left + width > 0 and top + height > 0
    )
    return None if inside else "box outside its image"


def _is_coordinate(value: object) -> bool:
    # NaN and infinities fail the comparison.
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and -_COORDINATE_LIMIT < value < _COORDINATE_LIMIT
    )
