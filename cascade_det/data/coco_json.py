"""The check of a COCO-format json: what is usable, and what is wrong with the rest.

The json is read directly and not through ``pycocotools.coco.COCO``: that class indexes by id, so
duplicate ids vanish before they can be reported, and on other bad data it fails with a KeyError.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any

from cascade_det.data.annotation_file import read_annotation_file
from cascade_det.data.catalog import DatasetSource
from cascade_det.data.image_names import NEAR_LINKS, LinkRule, name_guard
from cascade_det.data.issues import Issues, shown
from cascade_det.text import check_name

JsonObject = dict[str, Any]

# Beyond any image, and far from where float32 ends.
_COORDINATE_LIMIT = 1e9
_ID_LIMIT = 2**63  # of what other programs can hold

_TOLD = ("image_id", "category_id", "bbox")  # of an annotation
_TOLD_OF_IMAGES = ("file_name", "width", "height")


@dataclass
class CheckedJson:
    """The entries of a json that may be used as they are, and a list of all others.

    Attributes:
        images: by image id, ascending.
        image_ids: of all images, those that are left out included.
        annotations: by image id, in the order of the json; also those of ``of_no_area``.
        has_annotations: whether the json has the key ``annotations``.
        categories: names by category id, ascending.
        unusable: what leaves no data set: the structure of the file, or its categories.
        bad: images and annotations left out because they are wrong.
        of_no_area: annotations whose box is empty: counted by an evaluation, of no use in training.
    """

    images: dict[int, JsonObject] = field(default_factory=dict)
    image_ids: set[Any] = field(default_factory=set)
    annotations: dict[int, list[JsonObject]] = field(default_factory=dict)
    has_annotations: bool = False
    categories: dict[int, str] = field(default_factory=dict)
    unusable: Issues = field(default_factory=Issues)
    bad: Issues = field(default_factory=Issues)
    of_no_area: Issues = field(default_factory=Issues)


def check_coco_json(source: DatasetSource, links: LinkRule = NEAR_LINKS) -> CheckedJson:
    """Read a json and check every image, category and annotation in it, but no image file.

    Args:
        source: a json in COCO format, where ``annotations`` may be absent, and the folder that no
            file name may leave.
        links: which links may leave it.

    Raises:
        DatasetError: the file cannot be read, is no json, or has no object at the top.
    """
    content = read_annotation_file(source.json_file)
    checked = CheckedJson(has_annotations="annotations" in content)
    categories = _entries(content, "categories", checked, checked.unusable)
    _check_categories(categories, checked)
    # Where categories are wrong or missing, annotations are not blamed for theirs.
    category_ids = _Everything() if checked.unusable else checked.categories
    images = _entries(content, "images", checked, checked.bad)
    _check_images(images, name_guard(source, links), checked)
    if checked.has_annotations:
        _check_annotations(
            _entries(content, "annotations", checked, checked.bad),
            # What is bad stays known, so that its annotations are not blamed as well.
            checked.image_ids if isinstance(content.get("images"), list) else _Everything(),
            category_ids,
            # COCO's own 2014 minival files repeat ids; Detectron2 takes them, and so do we.
            ids_may_repeat="minival" in source.json_file.name,
            checked=checked,
        )
    return checked


class _Everything(Container[object]):
    """What is known where the list that would say so is missing."""

    def __contains__(self, _: object) -> bool:
        return True


def _entries(
    content: JsonObject, key: str, checked: CheckedJson, problems: Issues
) -> list[JsonObject]:
    """The objects in the list under a key of the top level."""
    entries = content.get(key)
    if not isinstance(entries, list):
        how = "is no list" if key in content else "is missing"
        checked.unusable.add(
            "key without which this is not COCO format", "{!r} {}".format, key, how
        )
        return []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            problems.add(f"entry of {key!r} that is no object", "{}[{}]".format, key, index)
    return [entry for entry in entries if isinstance(entry, dict)]


def _check_categories(entries: list[JsonObject], checked: CheckedJson) -> None:
    """Fill in the categories. All of them must be right: each one less would renumber the rest."""
    counts = Counter(_plain_id(entry.get("id")) for entry in entries)
    for entry in entries:
        if problem := _id_problem(entry, "category", counts):
            checked.unusable.add(problem, _describe, "category", entry, ("name",))
            continue
        try:
            checked.categories[entry["id"]] = check_name(entry.get("name"))
        except ValueError as error:
            checked.unusable.add(
                "category without a usable 'name'", "category {}: {}".format, entry["id"], error
            )
    if not entries and not checked.unusable:
        checked.unusable.add("list of classes without any", "'categories'".format)
    checked.categories = dict(sorted(checked.categories.items()))


def _check_images(
    entries: list[JsonObject],
    leads_wrong: Callable[[str], tuple[str, str] | None],
    checked: CheckedJson,
) -> None:
    """Fill in the images; of those that share an id none, as nobody knows whose the boxes are."""
    counts = Counter(_plain_id(entry.get("id")) for entry in entries)
    for entry in entries:
        detail = ""
        problem = _id_problem(entry, "image", counts) or _file_name_problem(entry)
        if not problem and (wrong := leads_wrong(entry["file_name"])):
            problem, detail = wrong
        problem = problem or _size_problem(entry)
        if problem:
            checked.bad.add(problem, _describe, "image", entry, _TOLD_OF_IMAGES, detail)
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
        problem = _annotation_problem(entry, image_ids, category_ids) or _box_problem(
            entry.get("bbox"), checked.images.get(entry["image_id"])
        )
        if not problem and entry["id"] in ids and not ids_may_repeat:
            problem = "annotation with the id of another one"
        if problem:
            checked.bad.add(problem, _describe, "annotation", entry, _TOLD)
            continue
        ids.add(entry["id"])
        if min(entry["bbox"][2:]) == 0:
            checked.of_no_area.add(
                "box of zero width or height", _describe, "annotation", entry, _TOLD
            )
        by_image[entry["image_id"]].append(entry)
    checked.annotations = by_image


# -- ids ------------------------------------------------------------------------------------------


def _plain_id(value: object) -> int | str | None:
    """An id as it is looked up: a text is none, but annotations of its image are told by it.

    So are those of a float, by its text: as a number, 1.0 would be found as 1.
    """
    if isinstance(value, float):
        return repr(value)
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def _id_problem(entry: JsonObject, what: str, counts: Counter[Any]) -> str | None:
    if problem := _integer_problem(what, entry, "id"):
        return problem
    return f"{what} that shares its id with another" if counts[entry["id"]] > 1 else None


def _integer_problem(what: str, entry: JsonObject, key: str) -> str | None:
    value = entry.get(key)
    if type(value) is int:
        return None if _is_id(value) else f"{what} whose {key!r} is beyond 64 bits"
    if isinstance(value, float):
        return f"{what} whose {key!r} is a float, not an integer (1, not 1.0)"
    if isinstance(value, str):
        return f'{what} whose {key!r} is text, not an integer (1, not "1")'
    return f"{what} without an integer {key!r}"


def _is_id(value: int) -> bool:
    return -_ID_LIMIT <= value < _ID_LIMIT


def _describe(what: str, entry: JsonObject, keys: tuple[str, ...], detail: str = "") -> str:
    facts = ", ".join(f"{key} {shown(entry[key])}" for key in keys if key in entry)
    described = f"{what} {shown(entry.get('id'))} ({facts})"
    return f"{described}: {detail}" if detail else described


# -- images ---------------------------------------------------------------------------------------


def _file_name_problem(image: JsonObject) -> str | None:
    return None if _is_path(image.get("file_name")) else "image without a usable 'file_name'"


def _size_problem(image: JsonObject) -> str | None:
    for side in ("height", "width"):
        if problem := _integer_problem("image", image, side):
            return problem
        if image[side] <= 0:
            return f"image whose {side!r} is not above 0"
    return None


def _is_path(value: object) -> bool:
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:  # half of a surrogate pair, which json can spell
        return False
    return True


# -- annotations ----------------------------------------------------------------------------------


def _annotation_problem(
    annotation: JsonObject, image_ids: Container[object], category_ids: Container[object]
) -> str | None:
    if problem := _integer_problem("annotation", annotation, "id"):
        return problem
    if problem := _reference_problem(annotation, "image", image_ids):
        return problem
    if problem := _reference_problem(annotation, "category", category_ids):
        return problem
    if annotation.get("iscrowd", 0) not in (0, 1):
        return "annotation whose 'iscrowd' is neither 0 nor 1"
    if annotation.get("ignore", 0) != 0:
        return "annotation with 'ignore', which is not supported (use 'iscrowd')"
    if annotation.get("area") is not None and not _is_coordinate(annotation["area"]):
        return "annotation whose 'area' is no finite number"
    return None


def _reference_problem(annotation: JsonObject, what: str, ids: Container[object]) -> str | None:
    """What is wrong with the image or category that an annotation names.

    One that is bad itself is told already, and known by what it has in the place of an id.
    """
    value = annotation.get(f"{what}_id")
    looked_up = _plain_id(value)
    if looked_up is not None and looked_up in ids:
        return None
    is_meant = (isinstance(value, float) and value.is_integer() and int(value) in ids) or (
        isinstance(value, str) and value.isdecimal() and len(value) < 20 and int(value) in ids
    )
    if is_meant:
        return _integer_problem("annotation", annotation, f"{what}_id")
    return f"annotation of an unknown {what}"


def _box_problem(box: Any, image: JsonObject | None) -> str | None:
    """What is wrong with a box in COCO's XYWH; the image is None where it is bad itself."""
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
    # NaN and the infinities fail the comparison.
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and -_COORDINATE_LIMIT < value < _COORDINATE_LIMIT
    )
