"""The list of images to detect in: from files, folders, globs, COCO json and parquet."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from cascade_det.data.given_files import find_images
from cascade_det.data.image_names import IMAGE_SUFFIXES
from cascade_det.data.issues import shown
from cascade_det.errors import DatasetError
from cascade_det.offline.addresses import (
    file_system,
    is_address,
    local_or_address,
    naming_address,
    opened,
)
from cascade_det.offline.parquet import open_parquet
from cascade_det.text import printable

_GLOB = "*?["
_SMALLEST_ID, _LARGEST_ID = -(2**63), 2**63 - 1


class Packed(NamedTuple):
    """Where the bytes of an image are in a parquet file."""

    file: str
    row_group: int
    row: int  # in the group


class Entry(NamedTuple):
    """An image of the list.

    Attributes:
        id: different for each image.
        path: absolute, or an address; of packed images any text.
        packed: where the bytes are, if not at the path.
    """

    id: int
    path: str
    packed: Packed | None = None


# An image before it has a number: the id that its list gives, if it gives one.
_Found = tuple[int | None, str, Packed | None]


def list_images(inputs: Sequence[str], root: str | None = None) -> list[Entry]:
    """The images that a user names; files in order, each once.

    Args:
        inputs: image files, folders and globs, local or as addresses; and lists: COCO's json, or
            parquet with a column ``path`` and perhaps ``id`` and ``bytes`` (the file's content).
        root: folder of the names in lists; by default that of each list.

    Returns:
        Entries with the ids of the lists, or counted from 1 where no list has ids.

    Raises:
        DatasetError: an input is missing, empty or wrong, ids repeat, or only some images have one.
    """
    found: dict[_Found, None] = {}
    for given in inputs:
        images = list(_images_of(given, root))
        if not images and not _is_list(given):
            raise DatasetError(f"--input {printable(given)}: there is no image")
        found.update(dict.fromkeys(images))
    numbered = [image for image in found if image[0] is not None]
    if not numbered:
        return [Entry(i, path, packed) for i, (_, path, packed) in enumerate(found, start=1)]
    if len(numbered) < len(found):
        raise DatasetError(
            f"--input: {len(numbered)} images have ids from a list, and "
            f"{len(found) - len(numbered)} images "
            "have none. Run them apart, or give all of them in lists with ids."
        )
    entries = [Entry(number, path, packed) for number, path, packed in found if number is not None]
    _check_ids(entries)
    return entries


def _check_ids(entries: Sequence[Entry]) -> None:
    seen: dict[int, str] = {}
    for entry in entries:
        if entry.id in seen:
            raise DatasetError(
                f"--input: the id {entry.id} is of {shown(seen[entry.id])} and of "
                f"{shown(entry.path)}. Ids must differ."
            )
        seen[entry.id] = entry.path


def _is_list(given: str) -> bool:
    return given.lower().endswith((".json", ".parquet"))


def _images_of(given: str, root: str | None) -> Iterator[_Found]:
    address = local_or_address(given)
    if _is_list(given):
        folder = local_or_address(root) if root is not None else address.rpartition("/")[0]
        read = _of_coco if given.lower().endswith(".json") else _of_parquet
        yield from read(address, folder)
    elif is_address(address):
        yield from ((None, path, None) for path in _at_address(address))
    else:
        # Given as the user wrote it, since only what follows an existing folder is a glob.
        local = address if given.startswith(("file://", "local://")) else given
        yield from ((None, os.path.abspath(file), None) for file in find_images([local]))


def _at_address(address: str) -> list[str]:
    """Image files at an address: itself, those right in a folder, or those of a glob."""
    if address.startswith(("http://", "https://")):
        return [address]  # a server lists nothing, and ? begins a query
    fs, path = file_system(address)
    with naming_address(address):
        if fs.isfile(path):
            return [address]
        if fs.isdir(path):
            names = [entry["name"] for entry in fs.ls(path, detail=True) if entry["type"] == "file"]
        elif any(character in path for character in _GLOB):
            names = fs.glob(path)
        else:
            raise FileNotFoundError("there is no such file or folder")
        return [
            fs.unstrip_protocol(name)
            for name in sorted(names)
            if name.lower().endswith(IMAGE_SUFFIXES)
        ]


def _of_coco(address: str, folder: str) -> Iterator[_Found]:
    with opened(address) as file:
        content = file.read()
    try:
        images = json.loads(content)["images"]
        entries = [(entry["id"], entry["file_name"]) for entry in images]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DatasetError(
            f"{printable(address)}: is no list of images in COCO's format, an object with "
            f"'images' that each have 'id' and 'file_name' ({type(error).__name__}: {error})"
        ) from None
    for number, name in entries:
        yield _checked_id(number, address), _inside(name, folder, address), None


def _inside(name: Any, folder: str, source: str) -> str:
    """The path of a name in an annotation file, which never leaves its folder."""
    if not isinstance(name, str) or not name or name.startswith("/") or is_address(name):
        raise DatasetError(f"{printable(source)}: {shown(name)} is no name below an image folder")
    if ".." in name.split("/"):
        raise DatasetError(f"{printable(source)}: {shown(name)} leaves the image folder")
    return f"{folder.rstrip('/')}/{name}"


def _of_parquet(address: str, folder: str) -> Iterator[_Found]:
    with open_parquet(address) as file:
        names = set(file.schema_arrow.names)
        if "path" not in names:
            raise DatasetError(
                f"{printable(address)}: has no column 'path', only "
                f"{printable(', '.join(sorted(names)), longest=200)}"
            )
        columns = [name for name in ("path", "id") if name in names]
        for group in range(file.num_row_groups):
            values = file.read_row_group(group, columns=columns).to_pydict()
            ids = values.get("id", [None] * len(values["path"]))
            for row, (path, number) in enumerate(zip(values["path"], ids, strict=True)):
                if not isinstance(path, str) or not path:
                    raise DatasetError(
                        f"{printable(address)}: row {row} of row group {group} has the path "
                        f"{shown(path)}, which is no text"
                    )
                checked = _checked_id(number, address) if "id" in names else None
                if "bytes" in names:
                    yield checked, path, Packed(address, group, row)
                else:
                    yield checked, _absolute(path, folder), None


def _absolute(path: str, folder: str) -> str:
    """The path in a list that its user made: relative ones begin at a folder."""
    if path.startswith("/") or is_address(path):
        return local_or_address(path)
    return local_or_address(f"{folder.rstrip('/')}/{path}")


def _checked_id(number: Any, source: str) -> int:
    if type(number) is not int or not _SMALLEST_ID <= number <= _LARGEST_ID:
        raise DatasetError(f"{printable(source)}: {shown(number)} is not the whole number of an id")
    return number
