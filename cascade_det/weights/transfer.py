"""Requests for a file, or for the rest of a partial one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path
from typing import IO, Any
from urllib import request
from urllib.error import HTTPError

from tqdm import tqdm

from cascade_det.errors import DownloadError
from cascade_det.files import move_into_place, write_json

_BLOCK = 1 << 20
# Client errors that another try may fix; the range error after starting over.
_PASSING = (
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
    HTTPStatus.TOO_EARLY,
    HTTPStatus.TOO_MANY_REQUESTS,
)


class TransferFault(Exception):
    """The transfer failed in a way that another try may fix."""


class Transfer:
    """A partial download, and a tag that identifies the whole file.

    The tag holds the server's version mark (ETag or date) and the size of the whole file.
    """

    def __init__(self, address: str, path: Path, sha256: str, timeout: float) -> None:
        self.address = address
        self.path = path
        self._part = path.with_name(path.name + ".part")
        self._tag = path.with_name(path.name + ".part.json")
        self._sha256 = sha256
        self._timeout = timeout

    @property
    def size(self) -> int:
        """Bytes of the partial file."""
        return self._part.stat().st_size if self._part.exists() else 0

    @property
    def kept(self) -> int:
        """Bytes that can be continued."""
        # Without a mark or a checksum, halves of two different files would go unnoticed.
        return self.size if self._sha256 or self._read_tag()[0] else 0

    def attempt(self) -> None:
        """Complete the file with one request and move it into place; raises TransferFault."""
        version, total = self._read_tag()
        kept = self.kept
        if kept == 0 or kept != total:
            with self._open(kept, version) as response:
                kept = self._receive(response, kept, version)
        self._verify(continued=kept > 0)
        move_into_place(self._part, self.path)
        self._tag.unlink(missing_ok=True)

    def _open(self, kept: int, version: str) -> HTTPResponse:
        headers = {"User-Agent": "cascade_det"}
        if kept:
            headers["Range"] = f"bytes={kept}-"
        if kept and version:
            headers["If-Range"] = version
        try:
            wanted = request.Request(self.address, headers=headers)
            response: HTTPResponse = _OPENER.open(wanted, timeout=self._timeout)
            return response
        except HTTPError as error:
            error.close()
            if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                self._discard()
            reason = f"the server answers {error.code} {error.reason}".partition("\n")[0]
            if error.code >= 500 or error.code in _PASSING:
                raise TransferFault(reason) from error
            raise DownloadError(f"{self.address}: {reason}") from error
        except (InvalidURL, ValueError) as error:
            raise DownloadError(f"{self.address}: is not a valid address ({error})") from error
        except (OSError, HTTPException) as error:
            raise TransferFault(f"no answer ({error})") from error

    def _receive(self, response: HTTPResponse, kept: int, version: str) -> int:
        """Append the response to the partial file, or replace it; return the bytes kept."""
        self._check_kind(response)
        if response.status == HTTPStatus.PARTIAL_CONTENT:
            total: int | None = self._check_range(response, kept, version)
        else:
            kept, total = 0, response.length
            if total is None and not response.chunked and not self._sha256:
                raise DownloadError(
                    f"{self.address}: the server does not give the length of the file, so an "
                    "incomplete transfer would go unnoticed"
                )
        self._check_room(total)
        if not kept:
            self._discard()
        with open(self._part, "ab" if kept else "xb", opener=_not_through_links) as file:
            if not kept:
                write_json({"version": _version(response), "size": total}, self._tag)
            _copy(response, file, total, self.path.name)
            size = file.tell()
        if total is not None and size != total:
            raise TransferFault(f"the transfer broke off after {size:,} of {total:,} bytes")
        return kept

    def _check_kind(self, response: HTTPResponse) -> None:
        kind = response.headers.get_content_type()
        encoding = response.headers.get("Content-Encoding", "identity")
        if response.status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
            issue = f"the server answers {response.status} {response.reason}"
        elif kind == "text/html":
            issue = "the server answers with a web page; is a login needed?"
        elif encoding != "identity":
            issue = f"the server sends the file as {encoding}, though it was not asked to"
        else:
            return
        raise DownloadError(f"{self.address}: {issue}")

    def _check_range(self, response: HTTPResponse, kept: int, version: str) -> int:
        """Check that the response continues at ``kept``; returns the size of the whole file."""
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        # Some servers support ranges but not If-Range.
        is_same = not version or _version(response) in ("", version)
        if not found or int(found[1]) != kept or not is_same:
            self._discard()
            raise TransferFault("the server has another file now; starting over")
        return int(found[2])

    def _check_room(self, total: int | None) -> None:
        free = shutil.disk_usage(self.path.parent).free
        needed = (total or 0) - self.size
        if needed > free:
            raise DownloadError(
                f"{self.address}: {needed:,} more bytes are needed in {self.path.parent}, and "
                f"{free:,} are free"
            )

    def _verify(self, *, continued: bool) -> None:
        digest = sha256_of(self._part) if self._sha256 else ""
        if digest.startswith(self._sha256):
            return
        self._discard()
        if continued:
            raise TransferFault("the checksum of the continued file is wrong; starting over")
        raise DownloadError(
            f"{self.address}: the SHA-256 of the download is {digest}, and should be "
            f"{self._sha256}; the file is damaged, or another one"
        )

    def _read_tag(self) -> tuple[str, int | None]:
        try:
            tag = json.loads(self._tag.read_text())
            return str(tag["version"]), tag["size"]
        except (OSError, ValueError, TypeError, KeyError):
            return "", None

    def _discard(self) -> None:
        self._part.unlink(missing_ok=True)
        self._tag.unlink(missing_ok=True)


def _not_through_links(path: str, flags: int) -> int:
    """Other users may place links in a shared cache."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


class _WebRedirects(request.HTTPRedirectHandler):
    """Unlike urllib, refuses redirects to ftp:// and from https:// to http://."""

    def redirect_request(
        self, req: request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> request.Request | None:
        """Follow to http and https, but not from https to http."""
        wanted = "https" if req.type == "https" else "https?"
        if not re.match(f"{wanted}://[^/]", newurl, re.IGNORECASE):
            raise HTTPError(req.full_url, code, f"and redirects to {newurl}", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = request.build_opener(_WebRedirects)


def _copy(response: HTTPResponse, file: IO[bytes], total: int | None, name: str) -> None:
    bar = tqdm(desc=name, total=total, initial=file.tell(), unit="B", unit_scale=True, disable=None)
    with bar:
        while True:
            try:
                # Unlike read(), it returns the data that arrived before the connection broke.
                block = response.read1(_BLOCK)
            except (OSError, HTTPException) as error:
                raise TransferFault(f"the transfer broke off ({error})") from error
            if not block:
                return
            file.write(block)
            bar.update(len(block))


def _version(response: HTTPResponse) -> str:
    """The server's mark of this version of the file, for If-Range; empty if it has none."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, 64 digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
