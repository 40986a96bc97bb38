"""Downloads files by http: checked, continued after an interruption, written atomically.

Unlike the downloads of torch.hub, iopath and fvcore, these retry, resume, and check for disk space
first; torch.hub's also download once per process and accept an incomplete file.
"""

from __future__ import annotations

import logging
import re
import time
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from cascade_det.errors import DownloadError
from cascade_det.weights.transfer import Transfer, TransferFault, sha256_of

logger = logging.getLogger(__name__)


def download(
    address: str,
    path: Path,
    *,
    sha256: str = "",
    attempts: int = 4,
    pause: float = 1.0,
    timeout: float = 30.0,
) -> None:
    """Fetch ``address`` to ``path``, if there is no such file yet.

    ``path`` is written atomically. After an interruption ``path.part`` holds the beginning, and
    this call or a later one continues it if the server still has the same file. Of several
    processes on a machine one downloads and the others wait. The checksum of an existing file is
    checked.

    Args:
        address: http:// or https://; redirects are followed only to such addresses, and from
            https:// only to https://.
        path: a local file; its folder is made.
        sha256: of the file, or its first digits, in lower case; empty if unknown.
        attempts: tries in a row without new data before giving up.
        pause: seconds before the second try; doubles with each further one.
        timeout: seconds without data from the server that end a try.

    Raises:
        DownloadError: names the address; the server does not answer, refuses, or serves an
            unexpected file, the disk has no room, or the existing file has another checksum.
    """
    try:
        if path.is_file():
            return _check_present(address, path, sha256)
        if not re.match("https?://[^/]", address, re.IGNORECASE):
            raise DownloadError(f"{address}: only http:// and https:// are fetched")
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            if path.is_file():
                return _check_present(address, path, sha256)
            logger.info("Downloading %s to %s", address, path)
            _retry(Transfer(address, path, sha256, timeout), attempts, pause)
    except DownloadError:
        raise
    except (OSError, NotImplementedError) as error:
        raise DownloadError(f"{address}: cannot be stored as {path} ({error})") from error


def _check_present(address: str, path: Path, sha256: str) -> None:
    digest = sha256_of(path) if sha256 else ""
    if not digest.startswith(sha256):
        raise DownloadError(
            f"{path}: its SHA-256 is {digest}, and that of {address} should be {sha256}; the file "
            "is damaged, or another one. Delete it to fetch it again"
        )


def _retry(transfer: Transfer, attempts: int, pause: float) -> None:
    """Try until the file is complete, or ``attempts`` tries in a row brought no new data."""
    failures, most = 0, transfer.size
    while True:
        try:
            return transfer.attempt()
        except TransferFault as error:
            failures = failures + 1 if transfer.size <= most else 1
            most = max(most, transfer.size)
            if failures >= attempts:
                kept = f" with {transfer.kept:,} bytes, which the next call continues"
                raise DownloadError(
                    f"{transfer.address}: {error}; gave up{kept if transfer.kept else ''}"
                ) from error
            wait = pause * 2 ** (failures - 1)
            logger.warning("%s: %s. Trying again in %g s", transfer.address, error, wait)
            time.sleep(wait)


def _locked(path: Path) -> AbstractContextManager[BaseFileLock]:
    """Lock ``path`` between the processes of a machine; the lock ends with its process."""
    lock = FileLock(f"{path}.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        logger.info("Another process is downloading %s: waiting for it", path)
        return lock.acquire()
