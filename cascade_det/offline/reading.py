"""Reads the pixels of listed images, several ahead of the detector."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from cascade_det.data.transforms import Pixels, decode_image, read_image
from cascade_det.errors import CascadeDetError, DatasetError
from cascade_det.offline.addresses import file_system, is_address, naming_address
from cascade_det.offline.images import Entry, Packed
from cascade_det.offline.parquet import open_parquet
from cascade_det.text import printable

# A server may be busy for a moment: waits in seconds before reading from it again.
_WAITS = (0.5, 2.0)
# What waiting does not change.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError)


class Reader:
    """Reads images in threads, in order.

    Args:
        threads: that read at the same time; as many images, and a batch, wait to be detected.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._lock = threading.Lock()
        self._group: tuple[tuple[str, int], list[bytes | None]] | None = None

    def batches(
        self, entries: Sequence[Entry], size: int
    ) -> Iterator[list[tuple[Entry, Pixels | str]]]:
        """Batches of entries with their pixels, BGR uint8 ``[H, W, 3]``, or why there are none."""
        waiting: deque[Future[Pixels | str]] = deque()
        ahead = size + self._threads
        pool = ThreadPoolExecutor(self._threads)
        try:
            following = iter(entries)
            for start in range(0, len(entries), size):
                batch = entries[start : start + size]
                for entry in following:
                    waiting.append(pool.submit(self._read, entry))
                    if len(waiting) >= len(batch) + ahead:
                        break
                yield [(entry, waiting.popleft().result()) for entry in batch]
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, entry: Entry) -> Pixels | str:
        try:
            if entry.packed is not None:
                return decode_image(self._unpack(entry.packed), "BGR", name=entry.path)
            if is_address(entry.path):
                return decode_image(_fetch(entry.path), "BGR", name=entry.path)
            return read_image(entry.path, "BGR")
        except CascadeDetError as error:
            return str(error).removeprefix(f"{entry.path}: ")

    def _unpack(self, packed: Packed) -> bytes:
        key = packed.file, packed.row_group
        with self._lock:
            if self._group is None or self._group[0] != key:
                with open_parquet(packed.file) as file:
                    column = file.read_row_group(packed.row_group, columns=["bytes"])["bytes"]
                    self._group = key, column.to_pylist()
            content = self._group[1][packed.row]
        if not isinstance(content, bytes):
            raise DatasetError(
                f"row {packed.row} of row group {packed.row_group} of {printable(packed.file)} "
                "has no bytes"
            )
        return content


def _fetch(address: str) -> bytes:
    fs, path = file_system(address)
    with naming_address(address):
        for wait in _WAITS:
            try:
                content: bytes = fs.cat_file(path)
                return content
            except _FINAL:
                raise
            except Exception:  # of any library
                time.sleep(wait)
        content = fs.cat_file(path)
        return content
