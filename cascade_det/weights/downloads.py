"""Files by http: checked, continued where a transfer broke off, and whole or not there.

HTTP is urllib's, the lock filelock's, the progress bar tqdm's. The downloads of torch.hub, iopath
and fvcore begin again at every fault, never try a second time, and see a full disk when it is full;
torch.hub's also lets every process load the file, and takes a transfer that broke off for whole.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from cascade_det.errors import DownloadError
from cascade_det.weights.transfer import Transfer, TransferFault, is_web, sha256_of

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

    ``path`` appears whole. What came before an interruption waits in ``path.part``; it is continued
    if the server still has the same file, in this call and in later ones. Of several processes on a
    machine one downloads and the others wait. A file that is there is held against its checksum.

    Args:
        address: http:// or https://; redirects may lead to such addresses alone, and from
            https:// to https:// alone.
        path: a local file; its folder is made.
        sha256: of the file, or the first digits of it, lower case; empty where it is not known.
        attempts: how often in a row a try may bring nothing new before giving up.
        pause: seconds before the second try; doubles with every further one.
        timeout: seconds that the server may be silent.

    Raises:
        DownloadError: names the address; the server does not answer, refuses, or serves another
            file than it should, the disk has no room, or the file that is there is another one.
    """
    try:
        if path.is_file():
            return _check_present(address, path, sha256)
        if not is_web(address):
            raise DownloadError(f"{address}: only http:// and https:// are fetched")
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            if path.is_file():
                return _check_present(address, path, sha256)
            logger.info("Downloading %s to %s", address, path)
            transfer = Transfer(address, path, sha256, timeout)
            _persist(transfer, attempts, pause)
            transfer.finish()
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


def _persist(transfer: Transfer, attempts: int, pause: float) -> None:
    """Try until the file is here, or until ``attempts`` tries in a row brought nothing new."""
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


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock on ``path`` between the processes of a machine; it ends with its holder."""
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("Another process is downloading %s: waiting for it", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
