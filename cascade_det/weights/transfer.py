"""One request for a file, or for what is missing of it."""

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
# Of the client errors, those that another try may mend; the range after a start from the beginning.
_PASSING = (
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
    HTTPStatus.TOO_EARLY,
    HTTPStatus.TOO_MANY_REQUESTS,
)


class TransferFault(Exception):
    """The transfer failed in a way that another try may mend."""


class Transfer:
    """A file on its way: what is here of it, and a tag that says what it is the beginning of.

    The tag has the server's mark of the version (ETag or date) and the size of the whole file.
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
        """Bytes that are here."""
        return self._part.stat().st_size if self._part.exists() else 0

    @property
    def kept(self) -> int:
        """Bytes that can be continued."""
        # Without a mark or a checksum nobody would notice the halves of two files.
        return self.size if self._sha256 or self._read_tag()[0] else 0

    def attempt(self) -> None:
        """Go on from what is here to the whole file, with one request; raises TransferFault."""
        version, total = self._read_tag()
        kept = self.kept
        if kept == 0 or kept != total:
            with self._open(kept, version) as response:
                kept = self._receive(response, kept, version)
        self._verify(continued=kept > 0)

    def finish(self) -> None:
        """Give the whole file its name."""
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
            raise DownloadError(f"{self.address}: is no valid address ({error})") from error
        except (OSError, HTTPException) as error:
            raise TransferFault(f"no answer ({error})") from error

    def _receive(self, response: HTTPResponse, kept: int, version: str) -> int:
        """Write the answer behind what is kept, or instead of it; return how much was kept."""
        self._check_kind(response)
        if response.status == HTTPStatus.PARTIAL_CONTENT:
            total: int | None = self._check_range(response, kept, version)
        else:
            kept, total = 0, response.length
            if total is None and not response.chunked and not self._sha256:
                raise DownloadError(
                    f"{self.address}: the server does not say how long the file is, so that nobody "
                    "could tell whether it came whole"
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
            problem = f"the server answers {response.status} {response.reason}"
        elif kind == "text/html":
            problem = "the server answers with a web page; is a login needed?"
        elif encoding != "identity":
            problem = f"the server sends the file as {encoding}, though it was not asked to"
        else:
            return
        raise DownloadError(f"{self.address}: {problem}")

    def _check_range(self, response: HTTPResponse, kept: int, version: str) -> int:
        """Size of the whole file, of which the answer is the rest behind ``kept`` bytes."""
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        # Some servers know ranges and no If-Range.
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
            raise TransferFault("the checksum of what was continued is wrong; starting over")
        raise DownloadError(
            f"{self.address}: the SHA-256 of what came is {digest}, and should be {self._sha256}; "
            "the file is damaged, or another one"
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
    """Others may write into a shared cache as well."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


class _WebRedirects(request.HTTPRedirectHandler):
    """urllib follows redirects to ftp:// as well, and from https:// to http://."""

    def redirect_request(
        self, req: request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> request.Request | None:
        """Follow http and https, but not from the safe one to the other."""
        wanted = "https" if req.type == "https" else "https?"
        if not re.match(f"{wanted}://[^/]", newurl, re.IGNORECASE):
            raise HTTPError(req.full_url, code, f"and redirects to {newurl}", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = request.build_opener(_WebRedirects)


def is_web(address: str) -> bool:
    """Whether an address is http:// or https:// and has a host."""
    return re.match("https?://[^/]", address, re.IGNORECASE) is not None


def _copy(response: HTTPResponse, file: IO[bytes], total: int | None, name: str) -> None:
    bar = tqdm(desc=name, total=total, initial=file.tell(), unit="B", unit_scale=True, disable=None)
    with bar:
        while True:
            try:
                # Unlike read(), it hands out what is there before the connection breaks.
                block = response.read1(_BLOCK)
            except (OSError, HTTPException) as error:
                raise TransferFault(f"the transfer broke off ({error})") from error
            if not block:
                return
            file.write(block)
            bar.update(len(block))


def _version(response: HTTPResponse) -> str:
    """What tells one state of the file from the next, fit for If-Range; empty if nothing does."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def sha256_of(path: Path) -> str:
    """The checksum of a file, 64 digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
