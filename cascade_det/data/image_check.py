"""The check of image files before a run: by their headers, with a look at how they end."""

from __future__ import annotations

import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, NamedTuple

from PIL import ExifTags, Image
from tqdm import tqdm

from cascade_det.data.image_names import is_windows_path
from cascade_det.data.issues import shown
from cascade_det.data.transforms import read_image
from cascade_det.errors import DatasetError

# How a whole file of these formats ends. What ends otherwise is decoded before anything is said
# about it (bytes behind the end do no harm), and so is a file of a format that is not named here.
_LAST_BYTES = {
    "JPEG": b"\xff\xd9",
    "MPO": b"\xff\xd9",  # JPEG with further pictures behind the first, as many cameras write it
    "PNG": b"\0\0\0\0IEND\xaeB`\x82",
}
# Pillow reads these to the end when it opens them.
_READ_WHOLE = {"WEBP"}
_ROTATED_BY_90 = (5, 6, 7, 8)

# Tags of TIFF 6.0: offsets and lengths of the pixels in bytes; the kind of picture, where bit 0 is
# for a reduced resolution and bit 2 for a transparency mask.
_TIFF_STRIPS, _TIFF_TILES = (273, 279), (324, 325)
_TIFF_SUBFILE_TYPE, _TIFF_PREVIEW_OR_MASK = 254, 0b101

MISSING = "missing image file"

# Few enough that decoding needs no more memory than training would.
_decoding = threading.Semaphore(os.cpu_count() or 1)


class ImageEntry(NamedTuple):
    """An image as a json describes it.

    Attributes:
        image_id: its id.
        folder: where all images are.
        file_name: the file, from there.
        height: pixels.
        width: pixels.
    """

    image_id: int
    folder: str
    file_name: str
    height: int
    width: int

    @property
    def path(self) -> str:
        """The file."""
        return os.path.join(self.folder, self.file_name)


class ImageProblem(NamedTuple):
    """Why an image cannot be used.

    Attributes:
        kind: the same text for all images with this problem.
        detail: the image, and what is special about it.
    """

    kind: str
    detail: str


def find_bad_images(
    entries: Sequence[ImageEntry],
    *,
    decode: bool = False,
    share: tuple[int, int] = (0, 1),
    gather: Callable[[Any], list[Any]] = lambda findings: [findings],
    progress: str = "",
) -> dict[int, ImageProblem]:
    """Look at all files; in several threads, because most of the time goes in waiting for disks.

    Args:
        entries: the images.
        decode: whether to decode every image, which finds all that training would stumble over,
            and takes as long as reading the whole data set.
        share: (rank, number of processes) where several look at a part each.
        gather: gives the findings of all processes for those of this one.
        progress: what to call the bar that is shown when it takes long.

    Returns:
        By image id; what is not there is fine.
    """
    rank, processes = share
    mine = entries[rank::processes]
    Image.init()  # not safe in several threads at once
    found: dict[int, ImageProblem] = {}
    with (
        # Remarks of Pillow are no problems, and filters are common to all threads.
        warnings.catch_warnings(),
        ThreadPoolExecutor() as pool,
        tqdm(
            total=len(mine), desc=progress, unit="img", delay=2, disable=bool(rank) or None
        ) as bar,
    ):
        warnings.simplefilter("ignore")
        try:
            parts = [mine[start : start + 64] for start in range(0, len(mine), 64)]
            for part, problems in zip(
                parts, pool.map(lambda part: _check_all(part, decode), parts), strict=True
            ):
                found.update(problems)
                bar.update(len(part))
        finally:  # also when interrupted: do not look at the rest before leaving
            pool.shutdown(cancel_futures=True)
    return {key: value for part in gather(found) for key, value in part.items()}


def check_image(entry: ImageEntry, *, decode: bool = False) -> ImageProblem | None:
    """Look at one file: is it there, whole, one picture, and of the size that is expected?

    An image is opened without decoding it. Only if its end or its size is not as it should be, it
    is decoded as in training, whose result counts. So a good file is never reported, while some
    damage in the middle of a file is found with ``decode`` alone.
    """
    try:
        status = os.stat(entry.path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would make us wait for ever
            return _problem("image that is no file", entry)
        if status.st_size == 0:
            return _problem("empty image file", entry)
        with open(entry.path, "rb") as file:
            return _check_open_file(file, entry, decode)
    except FileNotFoundError:
        if is_windows_path(entry.file_name):
            return _problem(f"{MISSING}, of a Windows path (write folders as 'a/b.png')", entry)
        return _problem(MISSING, entry)
    except OSError as error:
        return _problem("image file that cannot be read", entry, str(error))


def _check_all(entries: Iterable[ImageEntry], decode: bool) -> Mapping[int, ImageProblem]:
    problems = ((entry.image_id, check_image(entry, decode=decode)) for entry in entries)
    return {image_id: problem for image_id, problem in problems if problem is not None}


def _check_open_file(file: IO[bytes], entry: ImageEntry, decode: bool) -> ImageProblem | None:
    try:
        with Image.open(file) as image:
            if _has_several_frames(image):
                return _problem("image of several frames or pages (whose boxes are these?)", entry)
            if image.mode == "F":
                return _problem("image of floating-point pixels, whose range is unknown", entry)
            stored, found = image.size[::-1], _upright_size(image)
            decode = decode or not _ends_as_it_should(image, file)
    except Image.DecompressionBombError as error:
        return _problem("enormous image (a decompression bomb?)", entry, str(error))
    except Exception:  # decoders fail in many ways; why, decoding tells
        stored, found, decode = (0, 0), (0, 0), True
    expected = (entry.height, entry.width)
    if decode or found != expected:
        try:
            with _decoding:
                height, width, _ = read_image(entry.path, "RGB").shape
                found = (height, width)
        except DatasetError as error:
            reason = str(error).removeprefix(f"{entry.path}: ")
            return _problem("image file that is truncated or no image", entry, reason)
    return None if found == expected else _size_problem(entry, found, stored)


def _size_problem(
    entry: ImageEntry, found: tuple[int, int], stored: tuple[int, int]
) -> ImageProblem:
    height, width = found
    sizes = f"{width}x{height} in the file, {entry.width}x{entry.height} in the json"
    if stored == (entry.height, entry.width):
        kind = "image whose size in the json is that before its EXIF rotation"
        return _problem(kind, entry, f"upright {sizes}")
    if found == (entry.width, entry.height):
        return _problem("image whose width and height are exchanged in the json", entry, sizes)
    return _problem("image whose size is not that in the json", entry, sizes)


def _problem(kind: str, entry: ImageEntry, reason: str = "") -> ImageProblem:
    name = f"image {entry.image_id} ({shown(entry.file_name)})"
    return ImageProblem(kind, f"{name}: {reason}" if reason else name)


def _has_several_frames(image: Image.Image) -> bool:
    """Whether there is more than one picture to choose from.

    Previews and masks in a TIFF, and the further pictures of a camera's JPEG, are none.
    """
    if not getattr(image, "is_animated", False) or image.format == "MPO":
        return False
    if image.format != "TIFF":
        return True
    pages = 0
    for frame in range(image.n_frames):  # type: ignore[attr-defined]
        image.seek(frame)
        pages += not image.tag_v2.get(_TIFF_SUBFILE_TYPE, 0) & _TIFF_PREVIEW_OR_MASK  # type: ignore[attr-defined]
    image.seek(0)
    return pages > 1


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) after the EXIF rotation, as far as the header tells it."""
    width, height = image.size
    # Without EXIF data in front, Pillow would decode a PNG in search of some behind the pixels.
    if (image.format == "PNG" and "exif" not in image.info) or image.format == "TIFF":
        return height, width
    rotated = image.getexif().get(ExifTags.Base.Orientation) in _ROTATED_BY_90
    return (width, height) if rotated else (height, width)


def _ends_as_it_should(image: Image.Image, file: IO[bytes]) -> bool:
    """Whether a file is known to be complete without decoding it."""
    size = file.seek(0, os.SEEK_END)
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        offsets = tags.get(_TIFF_STRIPS[0]) or tags.get(_TIFF_TILES[0]) or ()
        lengths = tags.get(_TIFF_STRIPS[1]) or tags.get(_TIFF_TILES[1]) or ()
        ends = [offset + length for offset, length in zip(offsets, lengths, strict=False)]
        return bool(ends) and max(ends) <= size
    mark = _LAST_BYTES.get(image.format or "")
    if mark is None:
        return image.format in _READ_WHOLE
    file.seek(-min(len(mark), size), os.SEEK_END)
    return file.read() == mark
