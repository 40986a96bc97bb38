"""Images behind http:// and https:// addresses, read into memory with limits."""

from __future__ import annotations

import base64
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import PurePosixPath
from typing import IO, Any
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from cascade_det.data.transforms import Pixels, decode_image
from cascade_det.errors import DatasetError
from cascade_det.text import printable

MOST_BYTES = 2**26  # 64 MiB
TIMEOUT = 30.0  # seconds without data
_LONGEST = 120.0  # seconds for all of an image
_CHUNK = 2**16
# Not all that Pillow has: some start other programs, and few servers have such images.
_DECODERS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
_VIDEO_TYPES = ("video/", "multipart/", "application/vnd.apple.mpegurl", "application/dash+xml")


def is_web_address(text: str) -> bool:
    """Whether a text begins like an address of the web."""
    return re.match("https?://", text, re.IGNORECASE) is not None


def check_address(text: str) -> None:
    """Check that a text with a scheme can be read as an address; others pass.

    Raises:
        DatasetError: it has no host, or a port that is none.
    """
    if "://" not in text:
        return
    try:
        parts = urlsplit(text)
        found = parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        found = None
    if not found:
        shown = printable(text.rpartition("@")[2], longest=60)
        raise DatasetError(
            f"--input …{shown}: is not an address: its host or port is missing or wrong"
        )


def without_credentials(address: str) -> str:
    """The address without a user name and password, to show or to save."""
    parts = urlsplit(address)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def stem_of(address: str) -> str:
    """A name for files about what is at the address; no separator of paths is in it."""
    parts = urlsplit(address)
    stem = PurePosixPath(unquote(parts.path)).stem
    return re.sub(r"[\\/\x00-\x1f\x7f]", "_", stem).strip(".") or parts.hostname or "image"


@dataclass(frozen=True)
class WebImage:
    """An image that a server has; ``str()`` is its address without credentials.

    Attributes:
        address: http:// or https://, perhaps with ``user:password@``.
    """

    address: str = field(repr=False)

    def __str__(self) -> str:
        return without_credentials(self.address)

    @property
    def stem(self) -> str:
        """Like ``Path.stem``."""
        return stem_of(self.address)

    def read(self, *, most_bytes: int = MOST_BYTES, timeout: float = TIMEOUT) -> Pixels:
        """Fetch and decode it: uint8 ``[H, W, 3]``, BGR.

        Args:
            most_bytes: more are an error.
            timeout: seconds without data.

        Raises:
            DatasetError: the server does not answer, refuses, is too slow, or serves too much or
                something that is not an image.
        """
        try:
            content = _fetch(self.address, most_bytes, timeout)
        except (OSError, HTTPException, ValueError) as error:
            # The text of some errors has the address with its password.
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(error, urllib.error.HTTPError):
                reason = f"{error.code} {error.reason}"
            raise DatasetError(
                f"{self}: cannot be fetched ({type(error).__name__}: {reason})"
            ) from None
        if isinstance(content, str):
            raise DatasetError(f"{self}: {content}")
        return decode_image(content, "BGR", name=str(self), decoders=_DECODERS)


class _WebOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects to the web alone, from https:// to https:// alone."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Any,
        newurl: str,
    ) -> urllib.request.Request | None:
        wanted = (
            "https://" if req.full_url.lower().startswith("https://") else ("http://", "https://")
        )
        if not newurl.lower().startswith(wanted):
            raise ValueError(f"a redirect to {without_credentials(newurl)} is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _fetch(address: str, most_bytes: int, timeout: float) -> bytes | str:
    """The content, or what is wrong with it."""
    end = time.monotonic() + _LONGEST
    opener = urllib.request.build_opener(_WebOnly)
    with opener.open(_request(urlsplit(address)), timeout=timeout) as response:
        kind = response.headers.get_content_type()
        if kind.startswith(_VIDEO_TYPES):
            return f"is a video ({kind}), not an image: write video+ before the address"
        content = bytearray()
        while chunk := response.read1(_CHUNK):
            content += chunk
            if len(content) > most_bytes:
                return f"has more than {most_bytes:,} bytes"
            if time.monotonic() > end:
                return f"took more than {_LONGEST:g} s"
        expected = response.headers.get("Content-Length", "")
        if expected.isdecimal() and int(expected) > len(content):
            return f"ended after {len(content):,} of {int(expected):,} bytes"
    return bytes(content)


def _request(parts: SplitResult) -> urllib.request.Request:
    address = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment=""))
    request = urllib.request.Request(address, headers={"User-Agent": "cascade_det"})
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        # Not sent again to where a redirect leads.
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(pair).decode()}")
    return request
