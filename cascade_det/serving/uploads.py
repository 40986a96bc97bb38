"""Images that strangers send: limits of bytes and pixels, and formats by content."""

from __future__ import annotations

import io
import warnings
from collections.abc import AsyncIterator

from PIL import ExifTags, Image

from cascade_det.data.transforms import Pixels, decode_image
from cascade_det.errors import CascadeDetError, DatasetError

# Browsers show all of them, and none needs another program to decode, as EPS does.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
_LISTED = "JPEG, PNG, WebP, BMP and GIF"


class UploadError(CascadeDetError):
    """A request that cannot be answered.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


async def read_at_most(chunks: AsyncIterator[bytes], announced: str | None, most: int) -> bytes:
    """Read a body while it is within a limit.

    Args:
        chunks: of the body.
        announced: the value of its Content-Length; ``None`` if it has none.
        most: bytes.

    Raises:
        UploadError: it is empty or larger; no more than ``most`` bytes and a chunk were read.
    """
    too_large = UploadError(
        413, f"The image is larger than {most / 2**20:.4g} MiB, the limit here."
    )
    if announced is not None and announced.isdecimal() and int(announced[:20]) > most:
        raise too_large
    content = bytearray()
    async for chunk in chunks:
        if len(content) + len(chunk) > most:
            raise too_large
        content += chunk
    if not content:
        raise UploadError(400, "The body is empty: send the content of an image file.")
    return bytes(content)


def check_image(content: bytes, most_pixels: int) -> None:
    """Check format and size by the header, before anything is decoded.

    Raises:
        UploadError: it is no image of one of ``FORMATS``, or has more pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                width, height = image.size
    except Image.DecompressionBombError:
        width = height = most_pixels  # and more
    except Exception as error:  # decoders raise SyntaxError, struct.error, ...
        raise UploadError(415, f"This is not an image. {_LISTED} are read.") from error
    if width * height > most_pixels:
        raise UploadError(
            413,
            f"The image has more than {most_pixels / 1e6:g} million pixels, the limit here.",
        )


def webp_orientation(content: bytes) -> int:
    """The EXIF orientation of a checked image if it is WebP, else 1.

    Detectors see every image upright, as browsers show JPEG and PNG; but not WebP.
    """
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        if image.format != "WEBP":
            return 1
        try:
            found = image.getexif().get(ExifTags.Base.Orientation)
        except Exception:  # broken EXIF data turns nothing
            return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def decode(content: bytes) -> Pixels:
    """Decode a checked image: uint8 ``[H, W, 3]``, BGR.

    Raises:
        UploadError: it is damaged.
    """
    try:
        return decode_image(content, "BGR", name="The image", decoders=FORMATS)
    except DatasetError as error:
        raise UploadError(422, "The image is damaged: it cannot be decoded.") from error
