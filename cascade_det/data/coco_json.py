"""The check of a COCO-format json: what is usable, and what is wrong with the rest.

The json is read directly and not through ``pycocotools.coco.COCO``: that class indexes by id, so
duplicate ids vanish before they can be reported, and on other bad data it fails with a KeyError.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cascade_det.errors import DatasetError

JsonObject = dict[str, Any]
# Kind of problem: the entries that have it, as the user can find them.
Problems = dict[str, list[str]]

# Beyond any image, and far from where float32 ends.
_COORDINATE_LIMIT = 1e9


@dataclass(frozen=True)
class CheckedJson:
    """The entries of a json that may be used as they are, and a list of all others.

    Attributes:
        images: by image id, ascending.
        annotations: by image id, in the order of the json; also those of ``of_no_area``.
        has_annotations: whether the json has the key ``annotations``.
        categories: names by category id, ascending.
        bad: images and annotations left out because they are wrong.
        of_no_area: annotations whose box is empty: counted by an evaluation, of no use in training.
    """

    images: dict[int, JsonObject]
    annotations: dict[int, list[JsonObject]]
    has_annotations: bool
    categories: dict[int, str]
    bad: Problems
    of_no_area: Problems


def check_coco_json(json_file: Path, image_root: Path) -> CheckedJson:
    """Read a json and check every image and annotation in it.

    Args:
        json_file: COCO format; ``annotations`` may be absent.
        image_root: the folder that no file name may leave.

    Raises:
        DatasetError: the file as a whole is unusable: unreadable, not json, not COCO's structure,
            or with image or category ids that are no integers or not unique.
    """
    content = _read_object(json_file)
    categories = _categories(content, json_file)
    bad: Problems = defaultdict(list)
    of_no_area: Problems = defaultdict(list)
    images = _by_id(_entries(content, "images", json_file), "image", json_file)
    usable = _usable_images(images, image_root, bad)
    # A bad image stays known here, so that its annotations are not blamed as well.
    annotations = _usable_annotations(content, json_file, images, categories, bad, of_no_area)
    return CheckedJson(usable, annotations, "annotations" in content, categories, bad, of_no_area)


def _read_object(json_file: Path) -> JsonObject:
    try:
        content = json.loads(json_file.read_bytes())
    except OSError as error:
        raise DatasetError(f"{json_file}: cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{json_file}: is not valid json: {error}") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{json_file}: is not COCO-format json: no object at the top")
    return content


def _entries(content: JsonObject, key: str, json_file: Path) -> list[JsonObject]:
    """The list of objects under a key of the top level."""
    if key not in content:
        raise DatasetError(f"{json_file}: is not COCO-format json: it has no key {key!r}")
    entries = content[key]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DatasetError(f"{json_file}: is not COCO-format json: {key!r} is no list of objects")
    return entries


def _by_id(entries: list[JsonObject], what: str, json_file: Path) -> dict[int, JsonObject]:
    found: dict[int, JsonObject] = {}
    for entry in entries:
        entry_id = entry.get("id")
        if type(entry_id) is not int:
            raise DatasetError(f"{json_file}: {what} with the id {entry_id!r:.80}, no integer")
        if entry_id in found:
            raise DatasetError(f"{json_file}: more than one {what} has the id {entry_id}")
        found[entry_id] = entry
    return found


def _categories(content: JsonObject, json_file: Path) -> dict[int, str]:
    entries = _by_id(_entries(content, "categories", json_file), "category", json_file)
    if not entries:
        raise DatasetError(f"{json_file}: 'categories' is empty; the classes come from there")
    for category_id, entry in entries.items():
        if not isinstance(entry.get("name"), str):
            raise DatasetError(f"{json_file}: category {category_id} has no 'name'")
    return {category_id: entries[category_id]["name"] for category_id in sorted(entries)}


def _usable_images(
    images: dict[int, JsonObject], image_root: Path, bad: Problems
) -> dict[int, JsonObject]:
    leaves_folder = _folder_guard(image_root)
    usable = {}
    for image_id, image in sorted(images.items()):
        problem = _image_problem(image, leaves_folder)
        if problem:
            bad[problem].append(f"image {image_id} ({image.get('file_name')!r:.80})")
        else:
            usable[image_id] = image
    return usable


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


def _usable_annotations(
    content: JsonObject,
    json_file: Path,
    image_ids: Container[int],
    category_ids: Container[int],
    bad: Problems,
    of_no_area: Problems,
) -> dict[int, list[JsonObject]]:
    by_image: dict[int, list[JsonObject]] = defaultdict(list)
    ids: set[int] = set()
    # COCO's own 2014 minival files repeat ids; Detectron2 takes them as they are, and so do we.
    ids_may_repeat = "minival" in json_file.name
    for entry in _entries(content, "annotations", json_file) if "annotations" in content else []:
        problem = _annotation_problem(entry, image_ids, category_ids)
        if not problem and entry["id"] in ids and not ids_may_repeat:
            problem = "annotation with the id of another one"
        if problem:
            bad[problem].append(_name_of(entry))
            continue
        ids.add(entry["id"])
        if min(entry["bbox"][2:]) == 0:
            of_no_area["box of zero width or height"].append(_name_of(entry))
        by_image[entry["image_id"]].append(entry)
    return by_image


def _annotation_problem(
    annotation: JsonObject, image_ids: Container[int], category_ids: Container[int]
) -> str | None:
    if type(annotation.get("id")) is not int:
        return "annotation without an integer 'id'"
    if not _is_id_in(image_ids, annotation.get("image_id")):
        return "annotation of an unknown image"
    if not _is_id_in(category_ids, annotation.get("category_id")):
        return "annotation of an unknown category"
    if annotation.get("iscrowd", 0) not in (0, 1):
        return "annotation whose 'iscrowd' is neither 0 nor 1"
    if annotation.get("ignore", 0) != 0:
        return "annotation with 'ignore', which is not supported (use 'iscrowd')"
    return _box_problem(annotation.get("bbox"))


def _is_id_in(ids: Container[int], value: object) -> bool:
    return type(value) is int and value in ids


def _box_problem(box: object) -> str | None:
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_coordinate, box)):
        return "box that is not four finite numbers"
    if min(box[2:]) < 0:
        return "box of negative width or height"
    return None


def _is_coordinate(value: object) -> bool:
    # NaN and the infinities fail the comparison.
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and -_COORDINATE_LIMIT < value < _COORDINATE_LIMIT
    )


def _name_of(annotation: JsonObject) -> str:
    told = {"image_id": "image", "category_id": "category", "bbox": "bbox"}
    facts = ", ".join(f"{name} {annotation.get(key)!r:.60}" for key, name in told.items())
    return f"annotation {annotation.get('id')!r:.20} ({facts})"
