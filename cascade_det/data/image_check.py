"""Checks a data set before a run: its json, and image files by their headers and last bytes."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from cascade_det.data.catalog import DatasetSource
from cascade_det.data.coco_json import CheckedJson, JsonObject, check_coco_json
from cascade_det.data.image_headers import decoding, has_several_frames, is_complete, upright_size
from cascade_det.data.image_names import NEAR_LINKS, LinkRule, is_windows_path
from cascade_det.data.issues import shown
from cascade_det.data.transforms import read_image
from cascade_det.errors import DatasetError
from cascade_det.text import printable

MISSING = "missing image file"


class ImageIssue(NamedTuple):
    """Why an image cannot be used.

    Attributes:
        kind: the same text for all images with this issue.
        detail: the image, and specifics.
    """

    kind: str
    detail: str


def check_dataset(
    source: DatasetSource,
    *,
    decode: bool = False,
    share: tuple[int, int] = (0, 1),
    gather: Callable[[Any], list[Any]] = lambda findings: [findings],
    links: LinkRule = NEAR_LINKS,
    masks: bool = False,
) -> CheckedJson:
    """Check a json and the files of its images; images with a bad file are added to ``bad``.

    Args:
        source: the json and the folder of its images.
        decode: whether to decode every image. This finds everything that training would fail on,
            and takes as long as reading the whole data set.
        share: (rank, number of processes) if several processes check a part each.
        gather: maps the findings of this process to those of all processes.
        links: which links out of the image folder are followed.
        masks: whether to read and check masks.

    Raises:
        DatasetError: the json cannot be read.
    """
    checked = check_coco_json(source, links, masks=masks)
    rank, processes = share
    mine = list(checked.images.values())[rank::processes]
    bar = tqdm(
        total=len(mine),
        desc=f"checking the images of {printable(source.name)}",
        unit="img",
        delay=2,
        disable=bool(rank) or None,
    )
    with bar:
        parts = gather(_find_bad_images(str(source.image_root), mine, decode, bar.update))
    found = {image_id: issue for part in parts for image_id, issue in part.items()}
    for image_id, issue in sorted(found.items()):
        del checked.images[image_id]
        checked.bad.add(issue.kind, str, issue.detail)
    return checked


def _find_bad_images(
    folder: str, images: Sequence[JsonObject], decode: bool, on_checked: Callable[[int], object]
) -> dict[int, ImageIssue]:
    """Check files in several threads, since most of the time is spent waiting for disks."""

    def check(part: Sequence[JsonObject]) -> dict[int, ImageIssue]:
        issues = ((image["id"], check_image(folder, image, decode=decode)) for image in part)
        return {image_id: issue for image_id, issue in issues if issue is not None}

    Image.init()  # not safe in several threads at once
    found: dict[int, ImageIssue] = {}
    # Pillow's warnings are not issues; the filters are global to all threads.
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")
        try:
            parts = [images[start : start + 64] for start in range(0, len(images), 64)]
            for part, issues in zip(parts, pool.map(check, parts), strict=True):
                found.update(issues)
                on_checked(len(part))
        finally:  # when interrupted, do not check the rest first
            pool.shutdown(cancel_futures=True)
    return found


def check_image(folder: str, entry: JsonObject, *, decode: bool = False) -> ImageIssue | None:
    """Check one file: does it exist, is it complete, one picture, and of the expected size?

    Args:
        folder: the image folder.
        entry: a checked image of a json.
        decode: see ``check_dataset``.

    The image is opened without decoding. Only if its last bytes or its size are unexpected, it is
    decoded as in training, and that result counts. A good file is therefore never reported, while
    damage in the middle of a file may be found only with ``decode``.
    """
    path = os.path.join(folder, entry["file_name"])
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would block for ever
            return _issue("image that is not a file", entry)
        if status.st_size == 0:
            return _issue("empty image file", entry)
        with open(path, "rb") as file:
            return _check_open_file(file, entry, decode)
    except FileNotFoundError:
        if is_windows_path(entry["file_name"]):
            return _issue(f"{MISSING}, of a Windows path (write folders as 'a/b.png')", entry)
        return _issue(MISSING, entry)
    except OSError as error:
        return _issue("image file that cannot be read", entry, str(error))


def _check_open_file(file: IO[bytes], entry: JsonObject, decode: bool) -> ImageIssue | None:
    try:
        with Image.open(file) as image:
            if has_several_frames(image):
                return _issue("image of several frames or pages (whose boxes are these?)", entry)
            if image.mode == "F":
                return _issue("image of floating-point pixels, whose range is unknown", entry)
            stored, found = image.size[::-1], upright_size(image)
            decode = decode or not is_complete(image, file)
    except Image.DecompressionBombError as error:
        return _issue("enormous image (a decompression bomb?)", entry, str(error))
    except Exception:  # decoders fail in many ways; read_image below says why
        stored, found, decode = (0, 0), (0, 0), True
    expected = (entry["height"], entry["width"])
    if decode or found != expected:
        try:
            with decoding:
                height, width, _ = read_image(file.name, "RGB").shape
                found = (height, width)
        except DatasetError as error:
            reason = str(error).removeprefix(f"{file.name}: ")
            return _issue("image file that is truncated or not an image", entry, reason)
    return None if found == expected else _size_issue(entry, found, stored)


def _size_issue(entry: JsonObject, found: tuple[int, int], stored: tuple[int, int]) -> ImageIssue:
    height, width = entry["height"], entry["width"]
    sizes = f"{found[1]}x{found[0]} in the file, {width}x{height} in the json"
    if stored == (height, width):
        kind = "image whose size in the json is that before its EXIF rotation"
        return _issue(kind, entry, f"upright {sizes}")
    if found == (width, height):
        return _issue("image whose width and height are swapped in the json", entry, sizes)
    return _issue("image whose size is not that in the json", entry, sizes)


def _issue(kind: str, entry: JsonObject, reason: str = "") -> ImageIssue:
    name = f"image {entry['id']} ({shown(entry['file_name'])})"
    return ImageIssue(kind, f"{name}: {reason}" if reason else name)
