"""YOLO: a file with the names of the classes, and a text file for each image.

A line is a class and the centre, width and height of a box, or the points of a polygon, all as
fractions of the image's width and height. An image without a file, or with an empty one, has no
objects. The label file of ``images/day/1.jpg`` is ``labels/day/1.txt``, as for Ultralytics. Without
a folder ``labels`` there, it is that beside the yaml, or else the label file lies beside the image.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cascade_det.data.catalog import DatasetSource, is_list_of_names
from cascade_det.data.image_names import LinkRule, name_guard
from cascade_det.data.issues import Issues, shown
from cascade_det.data.label_files import (
    UNREADABLE,
    Collector,
    JsonObject,
    Labels,
    image_sizes,
    images_by_stem,
    label_names,
    objects_of,
    polygons_of,
    read_bytes,
)
from cascade_det.errors import DatasetError

YAML_FILE, LABELS = "data.yaml", "labels"

# Ultralytics allows as much for rounding.
_BEYOND = 0.01
# Digits after the point: less than a thousandth of a pixel in any image that can be opened.
_DIGITS = 9

NO_LABELS = "folder without a label file of any image (no object at all?)"
NOT_NUMBERS = "YOLO line that is not a class and finite numbers"
ODD_LENGTH = "YOLO line of neither 4 numbers (a box) nor at least 3 points (a polygon)"
UNKNOWN_CLASS = "YOLO class without a name in the yaml (or list of names)"
NOT_FRACTIONS = "YOLO coordinates outside 0 to 1 (pixels instead of fractions of the image?)"


def read_yolo(source: DatasetSource, links: LinkRule, *, masks: bool) -> Labels:
    """Read the labels of the images below a folder.

    Args:
        source: a list of names, one a line, or the yaml, of which only ``names``, ``nc`` and
            ``kpt_shape`` are read: which images belong to the data set does not depend on paths in
            a file. And the folder of images.
        links: which links out of the folders of images and labels are followed.
        masks: whether to keep polygons.

    Raises:
        DatasetError: the file of names cannot be used.
    """
    path = source.json_file
    names, keypoints = (_read_names(path), 0) if is_list_of_names(path) else _read_yaml(path)
    bad = Issues()
    images = images_by_stem(source.image_root, name_guard(source, links), bad)
    root = labels_folder(source)
    guard = name_guard(DatasetSource(source.name, source.json_file, root), links)
    sizes = image_sizes(
        source.image_root, sorted(name for group in images.values() for name in group), bad
    )
    labelled = {stem for stem in images if os.path.lexists(root / f"{stem}.txt")}
    if images and not labelled:
        bad.add(NO_LABELS, str, shown(str(root)))
    collector = Collector(masks=masks)
    for stem, group in images.items():
        for name in group:
            if name in sizes:
                collector.add_image(name, sizes[name])
                if stem in labelled:
                    known = len(names), keypoints
                    _read_labels(root, f"{stem}.txt", guard, sizes[name], known, collector, bad)
    return collector.labels(names, bad)


def labels_folder(source: DatasetSource) -> Path:
    """The folder of the label files; the last ``images`` in a path of images is ``labels`` here."""
    parts = list(Path(os.path.abspath(source.image_root)).parts)
    folders = [source.json_file.parent / LABELS]
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        folders.insert(0, Path(*parts[:last], LABELS, *parts[last + 1 :]))
    return next((folder for folder in folders if folder.is_dir()), source.image_root)


def _read_labels(
    root: Path,
    label: str,
    guard: Any,
    size: tuple[int, int],
    known: tuple[int, int],
    collector: Collector,
    bad: Issues,
) -> None:
    if escape := guard(label):
        bad.add(escape[0], str, escape[1] or shown(label))
        return
    try:
        lines = read_bytes(root / label).decode("utf-8-sig").splitlines()
    except ValueError as error:
        bad.add(UNREADABLE, str, f"{shown(label)}: {error}")
        return
    height, width = size
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{label}:{number}"
        try:
            class_index, numbers = parse_line(line, *known)
        except ValueError as error:
            bad.add(str(error), str, f"{shown(place)} ({shown(line)})")
            continue
        if len(numbers) == 4:
            x, y, w, h = numbers
            box = ((x - w / 2) * width, (y - h / 2) * height, w * width, h * height)
            collector.add_object(class_index, box, place)
        else:
            points = [value * (height if i % 2 else width) for i, value in enumerate(numbers)]
            collector.add_object(class_index, box_around(points), place, [points])


def parse_line(line: str, num_classes: int, keypoints: int = 0) -> tuple[int, list[float]]:
    """One line of a label file.

    Args:
        line: not empty.
        num_classes: K.
        keypoints: numbers of key points behind a box, which are dropped.

    Returns:
        The class in ``[0, K)`` and fractions: centre x, centre y, width and height of a box, or
        x, y, x, y, ... of a polygon.

    Raises:
        ValueError: the line is wrong; the message is the kind of issue.
    """
    try:
        class_number, *numbers = map(float, line.split())
    except ValueError:
        raise ValueError(NOT_NUMBERS) from None
    if not all(map(math.isfinite, (class_number, *numbers))):
        raise ValueError(NOT_NUMBERS)
    # A fifth number is the score with which Ultralytics writes predictions.
    if len(numbers) == 5 or (keypoints and len(numbers) == 4 + keypoints):
        numbers = numbers[:4]
    if len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
        raise ValueError(ODD_LENGTH)
    if not class_number.is_integer() or not 0 <= class_number < num_classes:
        raise ValueError(UNKNOWN_CLASS)
    if not all(-_BEYOND <= number <= 1 + _BEYOND for number in numbers):
        raise ValueError(NOT_FRACTIONS)
    return int(class_number), numbers


def box_around(points: Sequence[float]) -> tuple[float, float, float, float]:
    """XYWH of the box around points x, y, x, y, ..."""
    left, top = min(points[::2]), min(points[1::2])
    return left, top, max(points[::2]) - left, max(points[1::2]) - top


def _read_names(path: Path) -> list[str]:
    """Names of the classes, one a line."""
    try:
        lines = read_bytes(path).decode("utf-8-sig").splitlines()
    except ValueError as error:
        raise DatasetError(f"{path}: cannot be read: {error}") from error
    names = [line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    if not all(names):
        raise DatasetError(f"{path}: line {names.index('') + 1} is empty, so it names no class")
    if len(set(names)) < len(names):
        raise DatasetError(f"{path}: two classes have the same name")
    return names


def _read_yaml(path: Path) -> tuple[list[str], int]:
    """Names of the classes, and the numbers of key points behind each box."""
    try:
        content = yaml.safe_load(read_bytes(path))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise DatasetError(f"{path}: is not valid yaml: {error}") from error
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict) and all(type(key) is int for key in names):
        if sorted(names) != list(range(len(names))):
            raise DatasetError(f"{path}: the keys of 'names' are not 0 to {len(names) - 1}")
        names = [names[key] for key in sorted(names)]
    if not isinstance(names, list) or not all(type(name) in (str, int) for name in names):
        raise DatasetError(f"{path}: has no 'names': a list of class names, or 0: name, 1: ...")
    count = content.get("nc", len(names))
    if count != len(names):
        raise DatasetError(f"{path}: 'nc' is {shown(count)}, but there are {len(names)} 'names'")
    if len(set(map(str, names))) < len(names):
        raise DatasetError(f"{path}: two classes of 'names' have the same name")
    shape = content.get("kpt_shape", (0, 0))
    if (
        not isinstance(shape, list | tuple)
        or len(shape) != 2
        or not all(type(side) is int and 0 <= side < 10_000 for side in shape)
    ):
        raise DatasetError(f"{path}: 'kpt_shape' is not [number of key points, 2 or 3]")
    return [str(name) for name in names], shape[0] * shape[1]


def write_yolo(content: JsonObject, image_root: Path, folder: Path, dropped: Issues) -> None:
    """Write ``data.yaml`` and ``labels/`` into a folder.

    Boxes and polygons are clipped to their image, since readers of YOLO refuse others.

    Args:
        content: ``ground_truth`` of a data set.
        image_root: the folder of its images.
        folder: exists.
        dropped: gets what the format cannot hold.

    Raises:
        DatasetError: two images would share a label file, or a name cannot be written.
    """
    class_of = {entry["id"]: index for index, entry in enumerate(content["categories"])}
    labels = label_names(content, image_root, ".txt")
    for image, entries in objects_of(content, dropped):
        size = image["width"], image["height"]
        lines = []
        for entry in entries:
            if entry.get("segmentation") and (polygons := polygons_of(entry, dropped)):
                numbers = _joined(polygons, dropped, entry)
            else:
                numbers = _centred(entry["bbox"], *size)
            fractions = [number / size[i % 2] for i, number in enumerate(numbers)]
            text = [f"{min(max(value, 0.0), 1.0):.{_DIGITS}f}" for value in fractions]
            lines.append(" ".join([str(class_of[entry["category_id"]]), *text]) + "\n")
        path = folder / LABELS / labels[image["id"]]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
    names = {class_of[entry["id"]]: entry["name"] for entry in content["categories"]}
    # Ultralytics looks for images/ beside labels/. It also demands "val", which the user adds: a
    # validation on the training images would look too good.
    header = {"train": "images", "names": names}
    text = yaml.safe_dump(header, allow_unicode=True, sort_keys=False)
    (folder / YAML_FILE).write_text(text, encoding="utf-8")


def _centred(box: Sequence[float], width: int, height: int) -> list[float]:
    """XYWH as centre and size of the part inside the image."""
    left, top = max(box[0], 0.0), max(box[1], 0.0)
    right, bottom = min(box[0] + box[2], width), min(box[1] + box[3], height)
    return [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]


def _joined(polygons: list[list[float]], dropped: Issues, entry: JsonObject) -> list[float]:
    """One polygon through several, since a line holds one: there and back along the same way."""
    first, *others = polygons
    if not others:
        return first
    kind = "mask of several polygons (joined into one by lines without area)"
    dropped.add(kind, str, f"annotation {entry['id']}")
    path = [*first, *first[:2]]
    for polygon in others:
        path += [*polygon, *polygon[:2], *first[:2]]
    return path
