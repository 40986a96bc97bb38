"""LabelMe: a json for each image, with rectangles, polygons and circles in pixels.

Shapes of one label and one ``group_id`` are one object. The box of an object is the one around its
points. Its mask is its polygons; rectangles and circles have none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cascade_det.data.annotation_file import read_json
from cascade_det.data.catalog import DatasetSource
from cascade_det.data.image_names import LinkRule, name_guard
from cascade_det.data.issues import Issues, shown
from cascade_det.data.label_files import (
    UNREADABLE,
    Collector,
    JsonObject,
    Labels,
    find_files,
    image_sizes,
    label_names,
    objects_of,
    polygons_of,
    relative_name,
)
from cascade_det.errors import DatasetError
from cascade_det.files import write_json

_LIMIT = 1e9  # beyond any image
_VERSION = "5.5.0"  # of the program whose files ours are like
_FEWEST_POINTS = {"rectangle": 2, "polygon": 3, "circle": 2}

BAD_SHAPE = "LabelMe shape without a label, or without enough points of two finite numbers"
OTHER_SHAPE = "LabelMe shape that has no area, or is a bitmap"
NO_IMAGE = "LabelMe file without 'imagePath'"


def read_labelme(source: DatasetSource, links: LinkRule, *, masks: bool) -> Labels:
    """Read the json files of a folder; classes are sorted by name.

    The image is ``imagePath``, or a file of that name in the image folder: the path of another
    computer says nothing.

    Args:
        source: the folder of the json files, and that of the images.
        links: which links out of the folder are followed.
        masks: whether to keep polygons.
    """
    bad = Issues()
    folder = source.json_file
    guard = name_guard(DatasetSource(source.name, folder, folder), links)
    files = dict(_parsed(folder, find_files(folder, (".json",), guard, bad), bad))
    named = {name: _image_name(name, files[name], source) for name in files}
    unsized = [named[name] for name in files if _size(files[name]) is None]
    sizes = image_sizes(source.image_root, filter(None, unsized), bad)
    collector = Collector(masks=masks)
    class_names: set[str] = set()
    for name, content in files.items():
        image = named[name]
        size = _size(content) or sizes.get(image)
        if not image:
            bad.add(NO_IMAGE, shown, name)
        elif size is not None:
            collector.add_image(image, size)
            for label, box, polygons, place in _objects(name, content["shapes"], bad):
                class_names.add(label)
                collector.add_object(label, box, place, polygons)
    return collector.labels(sorted(class_names), bad)


def _parsed(folder: Path, names: list[str], bad: Issues) -> Iterator[tuple[str, JsonObject]]:
    for name in names:
        try:
            content = read_json(folder / name)
        except DatasetError as error:
            bad.add(UNREADABLE, str, str(error))
            continue
        if isinstance(content, dict) and isinstance(content.get("shapes"), list):
            yield name, content
        else:
            bad.add("json that is not LabelMe's: no list 'shapes'", shown, name)


def _image_name(json_name: str, content: JsonObject, source: DatasetSource) -> str:
    """The image's name in the image folder; empty if the file names none."""
    path = content.get("imagePath")
    if not isinstance(path, str) or "\0" in path or not path.strip("/\\. "):
        return ""
    path = path.replace("\\", "/")  # written on Windows
    folder = os.path.dirname(json_name)
    said = os.path.relpath(os.path.join(source.json_file, folder, path), source.image_root)
    base = os.path.basename(path)
    names = [os.path.normpath(name) for name in (said, os.path.join(folder, base), base)]
    inside = [name for name in names if name.split(os.sep)[0] != ".."]
    there = (name for name in inside if os.path.lexists(os.path.join(source.image_root, name)))
    return next(there, base)


def _size(content: JsonObject) -> tuple[int, int] | None:
    height, width = content.get("imageHeight"), content.get("imageWidth")
    if type(height) is int and type(width) is int and min(height, width) > 0:
        return height, width
    return None


_Object = tuple[str, list[float], list[list[float]], str]


def _objects(name: str, shapes: list[Any], bad: Issues) -> Iterator[_Object]:
    """Label, box (XYWH), polygons and place of each object."""
    groups: dict[Any, tuple[str, list[list[float]], list[list[float]], str]] = {}
    for number, shape in enumerate(shapes, start=1):
        place = f"{name}, shape {number}"
        kind = shape.get("shape_type", "polygon") if isinstance(shape, dict) else "polygon"
        if not isinstance(kind, str) or kind not in _FEWEST_POINTS:
            bad.add(OTHER_SHAPE, str, f"{shown(place)} ({shown(kind)})")
            continue
        points = _points(shape, kind)
        if points is None:
            bad.add(BAD_SHAPE, str, shown(place))
            continue
        group = shape.get("group_id")
        key = number if type(group) is not int else (shape["label"], group)
        _, corners, polygons, _ = groups.setdefault(key, (shape["label"], [], [], place))
        corners.append(_corners(points, kind))
        if kind == "polygon":
            polygons.append([value for point in points for value in point])
    for label, corners, polygons, place in groups.values():
        left, top = (min(each[axis] for each in corners) for axis in (0, 1))
        right, bottom = (max(each[axis] for each in corners) for axis in (2, 3))
        # A mask of a part of the object would be wrong.
        masks = polygons if len(polygons) == len(corners) else []
        yield label, [left, top, right - left, bottom - top], masks, place


def _points(shape: Any, kind: str) -> list[list[float]] | None:
    if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
        return None
    points = shape.get("points")
    if not isinstance(points, list) or len(points) < _FEWEST_POINTS[kind]:
        return None
    for point in points:
        if not isinstance(point, list) or len(point) != 2 or not all(map(_is_number, point)):
            return None
    return points


def _is_number(value: Any) -> bool:
    # NaN and infinities fail the comparison.
    return type(value) in (int, float) and -_LIMIT < value < _LIMIT


def _corners(points: list[list[float]], kind: str) -> list[float]:
    """XYXY of the box around a shape."""
    if kind == "circle":  # its centre, and a point on it
        (x, y), (other_x, other_y) = points[:2]
        radius = ((x - other_x) ** 2 + (y - other_y) ** 2) ** 0.5
        return [x - radius, y - radius, x + radius, y + radius]
    columns = list(zip(*points, strict=True))
    return [min(columns[0]), min(columns[1]), max(columns[0]), max(columns[1])]


def write_labelme(content: JsonObject, image_root: Path, folder: Path, dropped: Issues) -> None:
    """Write a json for each image into a folder, with paths to the images where they are.

    An object with polygons is polygons, of one group if they are several; others are rectangles.

    Args:
        content: ``ground_truth`` of a data set.
        image_root: the folder of its images.
        folder: a temporary one beside that which gets its content.
        dropped: gets what the format cannot hold.

    Raises:
        DatasetError: two images would share a json, or a name cannot be written.
    """
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    files = label_names(content, image_root, ".json")
    for image, entries in objects_of(content, dropped):
        shapes: list[JsonObject] = []
        for entry in entries:
            shapes += _shapes(entry, names[entry["category_id"]], dropped)
        path = folder / files[image["id"]]
        image_path = Path(image_root, relative_name(image["file_name"], image_root))
        write_json(
            {
                "version": _VERSION,
                "flags": {},
                "shapes": shapes,
                "imagePath": os.path.relpath(image_path, path.parent),
                "imageData": None,
                "imageHeight": image["height"],
                "imageWidth": image["width"],
            },
            path,
            indent=2,
        )


def _shapes(entry: JsonObject, label: str, dropped: Issues) -> list[JsonObject]:
    polygons = polygons_of(entry, dropped)
    left, top, width, height = entry["bbox"]
    if polygons:
        points = [[list(pair) for pair in zip(p[::2], p[1::2], strict=True)] for p in polygons]
    else:
        points = [[[left, top], [left + width, top + height]]]
    return [
        {
            "label": label,
            "points": shape,
            "group_id": entry["id"] if len(points) > 1 else None,
            "description": "",
            "shape_type": "polygon" if polygons else "rectangle",
            "flags": {},
        }
        for shape in points
    ]
