"""The check of a COCO-format json: what is usable, and what is wrong with the rest.

The json is read directly and not through ``pycocotools.coco.COCO``: that class indexes by id, so
duplicate ids vanish before they can be reported, and on other bad data it fails with a KeyError.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from cascade_det.data.annotation_file import read_annotation_file
from cascade_det.data.problems import Problems, shown

JsonObject = dict[str, Any]

# Beyond any image, and far from where float32 ends.
_COORDINATE_LIMIT = 1e9
_ID_LIMIT = 2**63  # of what other programs can hold

_TOLD = ("image_id", "category_id", "bbox")  # of an annotation


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
    unusable: Problems = field(default_factory=Problems)
    bad: Problems = field(default_factory=Problems)
    of_no_area: Problems = field(default_factory=Problems)


def check_coco_json(json_file: Path, image_root: Path) -> CheckedJson:
    """Read a json and check every image, category and annotation in it, but no image file.

    Args:
        json_file: COCO format; ``annotations`` may be absent.
        image_root: the folder that no file name may leave.

    Raises:
        DatasetError: the file cannot be read, is no json, or has no object at the top.
    """
    content = read_annotation_file(json_file)
    checked = CheckedJson(has_annotations="annotations" in content)
    categories = _entries(content, "categories", checked, checked.unusable)
    _check_categories(categories, checked)
    # Where categories are wrong or missing, annotations are not blamed for theirs.
    category_ids = _Everything() if checked.unusable else checked.categories
    images = _entries(content, "images", checked, checked.bad)
    _check_images(images, image_root, checked)
    if checked.has_annotations:
        _check_annotations(
            _entries(content, "annotations", checked, checked.bad),
            # What is bad stays known, so that its annotations are not blamed as well.
            checked.image_ids if isinstance(content.get("images"), list) else _Everything(),
            category_ids,
            # COCO's own 2014 minival files repeat ids; Detectron2 takes them, and so do we.
            ids_may_repeat="minival" in json_file.name,
            checked=checked,
        )
    return checked


class _Everything(Container[object]):
    """What is known where the list that would say so is missing."""

    def __contains__(self, _: object) -> bool:
        return True


def _entries(
    content: JsonObject, key: str, checked: CheckedJson, problems: Problems
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
    counts = Counter(_plain_id(entry) for entry in entries)
    for entry in entries:
        problem = _id_problem(entry, "category", counts) or _name_problem(entry.get("name"))
        if problem:
            checked.unusable.add(problem, _describe, "category", entry, ("name",))
        else:
            checked.categories[entry["id"]] = entry["name"]
    if not entries and not checked.unusable:
        checked.unusable.add("list of classes without any", "'categories'".format)
    checked.categories = dict(sorted(checked.categories.items()))


def _name_problem(name: object) -> str | None:
    usable = isinstance(name, str) and name and _is_encodable(name)
    return None if usable else "category without a usable 'name'"


def _check_images(entries: list[JsonObject], image_root: Path, checked: CheckedJson) -> None:
    """Fill in the images; of those that share an id none, as nobody knows whose the boxes are."""
    leaves_folder = _folder_guard(image_root)
    counts = Counter(_plain_id(entry) for entry in entries)
    for entry in entries:
        problem = _id_problem(entry, "image", counts) or _image_problem(entry, leaves_folder)
        if problem:
            checked.bad.add(problem, _describe, "image", entry, ("file_name", "width", "height"))
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


def _plain_id(entry: JsonObject) -> int | str | None:
    """The id where it can be looked up: a text is no id, but its annotations can be told by it."""
    value = entry.get("id")
    return value if type(value) in (int, str) else None


def _id_problem(entry: JsonObject, what: str, counts: Counter[Any]) -> str | None:
    if not _is_id(entry.get("id")):
        return f"{what} without an integer 'id'"
    return f"{what} that shares its id with another" if counts[entry["id"]] > 1 else None


def _is_id(value: object) -> bool:
    return type(value) is int and -_ID_LIMIT <= value < _ID_LIMIT


def _describe(what: str, entry: JsonObject, keys: tuple[str, ...]) -> str:
    facts = ", ".join(f"{key} {shown(entry[key])}" for key in keys if key in entry)
    return f"{what} {shown(entry.get('id'))} ({facts})"


# -- images ---------------------------------------------------------------------------------------


def _folder_guard(image_root: Path) -> Callable[[str], bool]:
    """A test of file names: does following ``..``, ``/`` and links end outside the folder?"""
    root = os.path.realpath(image_root)
    # Many images share few folders; so one look per image, at the file itself, is enough.
    real_folder = cache(os.path.realpath)

    def leaves_folder(file_name: str) -> bool:
        folder, name = os.path.split(os.path.join(root, file_name))
        path = os.path.join(real_folder(folder), name)
        if name in ("", ".", "..") or os.path.islink(path):
            path = os.path.realpath(path)
        return not path.startswith(os.path.join(root, ""))

    return leaves_folder


def _image_problem(image: JsonObject, leaves_folder: Callable[[str], bool]) -> str | None:
    if not _is_path(image.get("file_name")):
        return "image without a usable 'file_name'"
    if leaves_folder(image["file_name"]):
        return "image whose 'file_name' leaves the image folder"
    if not all(type(image.get(side)) is int and image[side] > 0 for side in ("height", "width")):
        return "image without a positive integer 'height' and 'width'"
    return None


def _is_path(value: object) -> bool:
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:  # half of a surrogate pair, which json can spell
        return False
    return True


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# -- annotations ----------------------------------------------------------------------------------


def _annotation_problem(
    annotation: JsonObject, image_ids: Container[object], category_ids: Container[object]
) -> str | None:
    if not _is_id(annotation.get("id")):
        return "annotation without an integer 'id'"
    if not _is_known(image_ids, annotation.get("image_id")):
        return "annotation of an unknown image"
    if not _is_known(category_ids, annotation.get("category_id")):
        return "annotation of an unknown category"
    if annotation.get("iscrowd", 0) not in (0, 1):
        return "annotation whose 'iscrowd' is neither 0 nor 1"
    if annotation.get("ignore", 0) != 0:
        return "annotation with 'ignore', which is not supported (use 'iscrowd')"
    if annotation.get("area") is not None and not _is_coordinate(annotation["area"]):
        return "annotation whose 'area' is no finite number"
    return None


def _is_known(ids: Container[object], value: object) -> bool:
    return type(value) in (int, str) and value in ids


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
