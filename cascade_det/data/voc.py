"""Pascal VOC: an xml file for each image.

Corners are pixels counted from 1, and the last one belongs to the box, as in VOC2007: a box over
the whole of a 640 x 480 image is 1, 1, 640, 480, and 0, 0, 640, 480 here. So 1 is subtracted from
``xmin`` and ``ymin`` alone, as Detectron2 does. Objects marked ``difficult`` are ordinary ones, as
for Detectron2.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

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
    images_by_stem,
    label_names,
    objects_of,
    read_bytes,
    relative_name,
)
from cascade_det.errors import DatasetError

ANNOTATIONS, IMAGES, SPLITS = "Annotations", "JPEGImages", "ImageSets"

BAD_OBJECT = "VOC object without a name or four finite corners"
NO_IMAGE = "VOC file without an image of the same name"
FROM_ZERO = "VOC corner of 0 (does the file count pixels from 0? VOC counts from 1)"


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses document types, where entities are declared: what can expand, or be fetched."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("has a DOCTYPE, which is refused")


def read_voc(source: DatasetSource, links: LinkRule) -> Labels:
    """Read the xml files of a folder, or those that a list in ``ImageSets`` names.

    Classes are sorted by name, over all xml files of the folder, so that the splits of a data set
    agree. Images without an xml file do not belong to it.

    Args:
        source: the folder (or its parent, ``VOC2007``) or the list; and the folder of images.
        links: which links out of the folders are followed.

    Raises:
        DatasetError: the list cannot be read.
    """
    bad, odd = Issues(), Issues()
    folder = annotations_folder(source.json_file)
    guard = name_guard(DatasetSource(source.name, folder, folder), links)
    roots = dict(_parsed(folder, find_files(folder, (".xml",), guard, bad), bad))
    class_names = sorted(
        {
            name
            for root in roots.values()
            for entry in root.findall("object")
            if (name := _name(entry))
        }
    )
    wanted = _wanted(source.json_file, roots, folder, bad)
    images = images_by_stem(source.image_root, name_guard(source, links), bad)
    named = {stem: _image_name(stem, roots[stem], images, bad) for stem in wanted}
    unsized = [name for stem, name in named.items() if name and _size(roots[stem]) is None]
    sizes = image_sizes(source.image_root, unsized, bad)
    collector = Collector(masks=False)
    for stem in wanted:
        name, root = named[stem], roots[stem]
        size = _size(root) or sizes.get(name or "")
        if name is None or size is None:
            continue
        collector.add_image(name, size)
        for number, entry in enumerate(root.findall("object"), start=1):
            place = f"{stem}.xml, object {number}"
            corners, class_name = _corners(entry), _name(entry)
            if corners is None or class_name is None:
                bad.add(BAD_OBJECT, str, shown(place))
                continue
            left, top, right, bottom = corners
            if min(left, top) == 0:
                odd.add(FROM_ZERO, str, shown(place))
            collector.add_object(
                class_name, (left - 1, top - 1, right - left + 1, bottom - top + 1), place
            )
    return collector.labels(class_names, bad, odd)


def annotations_folder(path: Path) -> Path:
    """The folder of the xml files that belong to a folder, or to a list of names.

    Raises:
        DatasetError: a list is not below ``ImageSets``.
    """
    if path.is_dir():
        inner = path / ANNOTATIONS
        return inner if inner.is_dir() else path
    for parent in Path(os.path.abspath(path)).parents:
        if parent.name == SPLITS:
            return parent.parent / ANNOTATIONS
    raise DatasetError(
        f"{path}: a list of VOC images lies below {SPLITS}/, beside {ANNOTATIONS}/. Give such a "
        "list, or the folder of xml files."
    )


def _parsed(
    folder: Path, names: list[str], bad: Issues
) -> Iterator[tuple[str, ElementTree.Element]]:
    for name in names:
        try:
            yield os.path.splitext(name)[0], parse_xml(read_bytes(folder / name))
        except (ValueError, RecursionError, LookupError) as error:
            bad.add(UNREADABLE, str, f"{shown(name)}: {error}")


def parse_xml(content: bytes) -> ElementTree.Element:
    """The root of an xml file, which must not declare a document type.

    Raises:
        ValueError: it is not valid xml, or declares one.
    """
    parser = ElementTree.XMLParser(target=_NoDoctype())
    try:
        parser.feed(content)
        root: ElementTree.Element = parser.close()
    except ElementTree.ParseError as error:
        raise ValueError(f"is not valid xml: {error}") from error
    return root


def _wanted(path: Path, roots: dict[str, Any], folder: Path, bad: Issues) -> list[str]:
    """Names without ending of the xml files that belong to the data set."""
    if path.is_dir():
        return list(roots)
    try:
        lines = read_bytes(path).decode("utf-8-sig").splitlines()
    except ValueError as error:
        raise DatasetError(f"{path}: cannot be read: {error}") from error
    listed = dict.fromkeys(_listed(line.strip(), roots) for line in lines if line.strip())
    for stem in listed:
        # A file that is there was reported if it could not be read.
        if stem not in roots and not os.path.lexists(folder / f"{stem}.xml"):
            bad.add("listed image without an xml file", shown, stem)
    return [stem for stem in listed if stem in roots]


def _listed(line: str, roots: dict[str, Any]) -> str:
    """The name in a line; lists for one class have a second column, and CVAT quotes spaces."""
    if line in roots:
        return line
    quoted = line[1:].partition('"')[0] if line.startswith('"') else ""
    return quoted if quoted in roots else line.split()[0]


def _image_name(
    stem: str, root: ElementTree.Element, images: dict[str, list[str]], bad: Issues
) -> str | None:
    """The image of an xml file: ``filename`` is often wrong, so the file's own name counts."""
    found = images.get(stem, [])
    said = root.findtext("filename") or ""
    if len(found) > 1:
        found = [name for name in found if os.path.basename(name) == os.path.basename(said)]
    if len(found) != 1:
        bad.add(NO_IMAGE, str, f"{shown(stem + '.xml')} ('filename' {shown(said)})")
        return None
    return found[0]


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    """(height, width) if the file has it; some tools write 0."""
    values = [_number(root.findtext(f"size/{side}")) for side in ("height", "width")]
    if any(value is None or not 0 < value < 1e6 or not value.is_integer() for value in values):
        return None
    height, width = (int(value or 0) for value in values)
    return height, width


def _name(entry: ElementTree.Element) -> str | None:
    return (entry.findtext("name") or "").strip() or None


def _corners(entry: ElementTree.Element) -> list[float] | None:
    found = [_number(entry.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
    return [value for value in found if value is not None] if None not in found else None


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def write_voc(content: JsonObject, image_root: Path, folder: Path, dropped: Issues) -> None:
    """Write ``Annotations/`` into a folder; corners of fractions of a pixel are decimals.

    Args:
        content: ``ground_truth`` of a data set.
        image_root: the folder of its images.
        folder: exists.
        dropped: gets what the format cannot hold.

    Raises:
        DatasetError: two images would share an xml file, or a name cannot be written.
    """
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    files = label_names(content, image_root, ".xml")
    for image, entries in objects_of(content, dropped):
        root = ElementTree.Element("annotation")
        name = relative_name(image["file_name"], image_root)
        _add(root, "filename", os.path.basename(name))
        size = _add(root, "size")
        for key, value in (("width", image["width"]), ("height", image["height"]), ("depth", 3)):
            _add(size, key, str(value))
        _add(root, "segmented", "0")
        for entry in entries:
            if entry.get("segmentation"):
                kind = "mask, which the format cannot hold (the box is kept)"
                dropped.add(kind, str, f"annotation {entry['id']}")
            _add_object(root, names[entry["category_id"]], entry["bbox"])
        ElementTree.indent(root)
        path = folder / ANNOTATIONS / files[image["id"]]
        path.parent.mkdir(parents=True, exist_ok=True)
        ElementTree.ElementTree(root).write(path, encoding="utf-8")


def _add_object(root: ElementTree.Element, name: str, box: list[float]) -> None:
    left, top, width, height = box
    entry = _add(root, "object")
    _add(entry, "name", name)
    for key in ("pose", "truncated", "difficult"):
        _add(entry, key, "Unspecified" if key == "pose" else "0")
    corners = _add(entry, "bndbox")
    values = (left + 1, top + 1, left + width, top + height)
    for key, value in zip(("xmin", "ymin", "xmax", "ymax"), values, strict=True):
        _add(corners, key, f"{value:.6f}".rstrip("0").rstrip("."))


def _add(parent: ElementTree.Element, tag: str, text: str | None = None) -> ElementTree.Element:
    child = ElementTree.SubElement(parent, tag)
    child.text = text
    return child
