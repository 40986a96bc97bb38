"""Sizes of images from their headers, and whether files are complete, without decoding them."""

from __future__ import annotations

import os
import threading
from typing import IO

from PIL import ExifTags, Image

from cascade_det.data.transforms import read_image
from cascade_det.errors import DatasetError

# The last bytes of a complete file. Bytes after the end do no harm, so a file that ends in another
# way, or of another format, is decoded to find out.
_LAST_BYTES = {
    "JPEG": b"\xff\xd9",
    "MPO": b"\xff\xd9",  # JPEG with further pictures after the first, as many cameras write it
    "PNG": b"\0\0\0\0IEND\xaeB`\x82",
}
# Pillow reads these to the end on opening.
_READ_WHOLE = {"WEBP"}
_ROTATED_BY_90 = (5, 6, 7, 8)

# Tags of TIFF 6.0: offsets and lengths of the pixel data in bytes; the kind of picture, where bit 0
# means reduced resolution and bit 2 transparency mask.
_TIFF_STRIPS, _TIFF_TILES = (273, 279), (324, 325)
_TIFF_SUBFILE_TYPE, _TIFF_PREVIEW_OR_MASK = 254, 0b101

# Limits the memory of decoding to what training needs.
decoding = threading.Semaphore(os.cpu_count() or 1)


def image_size(path: str, *, decode: bool = False) -> tuple[int, int]:
    """(height, width) of an image, upright; its last bytes are checked as in :func:`check_image`.

    Args:
        path: of a file.
        decode: whether to decode the image, which finds all damage.

    Raises:
        DatasetError: the file is missing, truncated, or not one image with an 8- or 16-bit range.
    """
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            if has_several_frames(image):
                raise DatasetError(f"{path}: holds several frames or pages, not one image")
            if image.mode == "F":
                raise DatasetError(f"{path}: has floating-point pixels, whose range is unknown")
            if not decode and is_complete(image, file):
                return upright_size(image)
    except DatasetError:
        raise
    except Exception:  # decoders fail in many ways; read_image below says why
        pass
    with decoding:
        height, width, _ = read_image(path, "RGB").shape
    return height, width


def has_several_frames(image: Image.Image) -> bool:
    """Whether an image has several pictures that boxes could belong to.

    Previews and masks in a TIFF, and further pictures in a camera's JPEG, do not count.
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


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) after the EXIF rotation, if the header has it."""
    width, height = image.size
    # Without EXIF data in front, Pillow would decode a PNG in search of some behind the pixels.
    if (image.format == "PNG" and "exif" not in image.info) or image.format == "TIFF":
        return height, width
    rotated = image.getexif().get(ExifTags.Base.Orientation) in _ROTATED_BY_90
    return (width, height) if rotated else (height, width)


def is_complete(image: Image.Image, file: IO[bytes]) -> bool:
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
