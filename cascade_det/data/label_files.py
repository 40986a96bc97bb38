"""What the readers and writers of label files share: one file of labels for each image.

The readers return the content of a COCO json, so that everything behind them is checked, trained
on and evaluated as a COCO data set. They are our own. Those of the library ``supervision`` agree
with them on boxes (a test compares them), but end at the first bad line instead of listing all,
turn polygons into bitmaps, ignore subfolders and follow every link; its writers round YOLO's
fractions to 5 digits and VOC's corners to whole pixels, thin out polygons and lose crowds silently.
"""

from __future__ import annotations

import os
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from cascade_det.data.annotation_file import check_memory
from cascade_det.data.image_headers import image_size
from cascade_det.data.image_names import IMAGE_SUFFIXES
from cascade_det.data.issues import Issues, shown
from cascade_det.errors import DatasetError

JsonObject = dict[str, Any]
Guard = Callable[[str], tuple[str, str] | None]

UNREADABLE = "label file that cannot be read"
BAD_IMAGE = "image file that is missing, truncated or not an image"


@dataclass
class Labels:
    """Annotations of any format, as the content of a COCO json.

    Attributes:
        content: unchecked; an annotation has its file and line under ``label``.
        bad: what could not be read, and is not in ``content``.
        odd: what is probably a mistake in entries that were read.
    """

    content: JsonObject
    bad: Issues = field(default_factory=Issues)
    odd: Issues = field(default_factory=Issues)


class Collector:
    """Collects the images and objects of label files, and numbers them from 1.

    Args:
        masks: whether to keep polygons.
    """

    def __init__(self, *, masks: bool) -> None:
        self._masks = masks
        self._images: list[JsonObject] = []
        self._annotations: list[JsonObject] = []

    def add_image(self, file_name: str, size: tuple[int, int]) -> None:
        """Add an image, to which the next objects belong; ``size`` is (height, width)."""
        number = len(self._images) + 1
        entry = {"id": number, "file_name": file_name, "height": size[0], "width": size[1]}
        self._images.append(entry)

    def add_object(
        self,
        category: int | str,
        box: Sequence[float],
        label: str,
        polygons: Iterable[Iterable[float]] = (),
    ) -> None:
        """Add an object.

        Args:
            category: index from 0, or a name that :meth:`labels` gets.
            box: XYWH in pixels.
            label: the place in a file.
            polygons: x, y, x, y, ... in pixels.
        """
        entry: JsonObject = {
            "id": len(self._annotations) + 1,
            "image_id": len(self._images),
            "category_id": category,
            "bbox": list(box),
            "label": label,
        }
        if polygons and self._masks:
            entry["segmentation"] = [array("d", polygon) for polygon in polygons]
        self._annotations.append(entry)

    def labels(self, class_names: Sequence[str], bad: Issues, odd: Issues | None = None) -> Labels:
        """All that was added; class ``k`` of ``class_names`` is category ``k + 1``."""
        numbers = {name: number for number, name in enumerate(class_names, start=1)}
        for entry in self._annotations:
            category = entry["category_id"]
            entry["category_id"] = category + 1 if type(category) is int else numbers[category]
        content = {
            "images": self._images,
            "categories": [{"id": number, "name": name} for name, number in numbers.items()],
            "annotations": self._annotations,
        }
        return Labels(content, bad, odd or Issues())


def find_files(folder: Path, suffixes: Sequence[str], guard: Guard, bad: Issues) -> list[str]:
    """Names of regular files below a folder, with ``/`` between subfolders, in sorted order.

    Hidden files and folders are left out. Links that the guard refuses are added to ``bad``.
    """
    found: list[str] = []
    seen = {os.path.realpath(folder)}
    for place, folders, files in os.walk(folder, followlinks=True):
        below = os.path.relpath(place, folder)

        def is_allowed(name: str, below: str = below) -> bool:
            return not name.startswith(".") and not _is_refused(below, name, guard, bad)

        kept = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(place, name))
            # A link to a folder above would never end.
            if real not in seen and is_allowed(name):
                seen.add(real)
                kept.append(name)
        folders[:] = kept
        for name in sorted(files):
            # Reading a pipe would block for ever.
            if (
                name.lower().endswith(tuple(suffixes))
                and os.path.isfile(os.path.join(place, name))
                and is_allowed(name)
            ):
                found.append(os.path.normpath(os.path.join(below, name)))
    return sorted(found)


def _is_refused(below: str, name: str, guard: Guard, bad: Issues) -> bool:
    name = os.path.normpath(os.path.join(below, name))
    if escape := guard(name):
        kind, detail = escape
        bad.add(kind, str, detail or shown(name))
    return escape is not None


def images_by_stem(folder: Path, guard: Guard, bad: Issues) -> dict[str, list[str]]:
    """Names of the images below a folder, by their names without ending."""
    found: dict[str, list[str]] = {}
    for name in find_files(folder, IMAGE_SUFFIXES, guard, bad):
        found.setdefault(os.path.splitext(name)[0], []).append(name)
    return found


def image_sizes(folder: Path, names: Iterable[str], bad: Issues) -> dict[str, tuple[int, int]]:
    """(height, width) of images, upright; those that cannot be opened are added to ``bad``."""
    names = list(names)

    def size(name: str) -> tuple[int, int] | str:
        path = os.path.join(folder, name)
        try:
            if not os.path.isfile(path):
                return "there is no such file"
            return image_size(path)
        except DatasetError as error:
            return str(error).removeprefix(f"{path}: ")

    found: dict[str, tuple[int, int]] = {}
    Image.init()  # not safe in several threads at once
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # Pillow's; the filters are global to all threads
        for name, result in zip(names, pool.map(size, names), strict=True):
            if isinstance(result, str):
                bad.add(BAD_IMAGE, str, f"{shown(name)}: {result}")
            else:
                found[name] = result
    return found


def read_bytes(path: Path) -> bytes:
    """The content of a label file.

    Raises:
        ValueError: it cannot be read, is no file, or does not fit in memory.
    """
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        check_memory(path)
        return path.read_bytes()
    except OSError as error:
        raise ValueError(str(error)) from error


def objects_of(content: JsonObject, dropped: Issues) -> Iterator[tuple[JsonObject, list[Any]]]:
    """Each image of a checked data set with the objects that a label file can hold.

    Args:
        content: ``ground_truth`` of a data set.
        dropped: gets what no format but COCO can hold: crowds and empty boxes.
    """
    by_image: dict[int, list[JsonObject]] = {}
    for entry in content.get("annotations", ()):
        if entry["iscrowd"]:
            dropped.add("crowd (left out)", str, f"annotation {entry['id']}")
        elif min(entry["bbox"][2:]) <= 0:
            kind = "box of zero width or height (left out)"
            dropped.add(kind, str, f"annotation {entry['id']}")
        else:
            by_image.setdefault(entry["image_id"], []).append(entry)
    for image in content["images"]:
        yield image, by_image.get(image["id"], [])


def polygons_of(entry: JsonObject, dropped: Issues) -> list[list[float]]:
    """The polygons of an object, each x, y, x, y, ...; none, and a note, if its mask is RLE."""
    mask = entry.get("segmentation")
    if isinstance(mask, dict):
        kind = "mask in RLE, which the format cannot hold (the box is kept)"
        dropped.add(kind, str, f"annotation {entry['id']}")
    return mask if isinstance(mask, list) else []


def label_names(content: JsonObject, image_root: Path, suffix: str) -> dict[int, str]:
    """The name of each image's label file by image id: ``day/1.txt`` for ``day/1.jpg``.

    Raises:
        DatasetError: two images would share a file, or a name cannot be written.
    """
    names: dict[int, str] = {}
    taken: dict[str, str] = {}
    for image in content["images"]:
        name = relative_name(image["file_name"], image_root)
        label = os.path.splitext(name)[0] + suffix
        if label in taken:
            raise DatasetError(
                f"images {shown(taken[label])} and {shown(name)} would share the label file "
                f"{shown(label)}. Rename one of them."
            )
        taken[label] = name
        names[image["id"]] = label
    return names


def relative_name(file_name: str, image_root: Path) -> str:
    """A checked file name without ``..``, relative to the image folder.

    Raises:
        DatasetError: it leaves the folder, or has characters that a file of text cannot hold.
    """
    name = os.path.normpath(file_name)
    if os.path.isabs(name):
        name = os.path.relpath(name, os.path.abspath(image_root))
    if name.split(os.sep)[0] == "..":
        raise DatasetError(f"image {shown(file_name)}: its name leaves the image folder")
    if not name.isprintable():
        raise DatasetError(f"image {shown(file_name)}: its name has unprintable characters")
    return name
