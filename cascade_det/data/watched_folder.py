"""Images that appear in folders, each once it is completely written."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cascade_det.data.image_names import IMAGE_SUFFIXES
from cascade_det.data.transforms import Pixels, read_image
from cascade_det.errors import DatasetError

PERIOD = 0.5  # seconds between two looks
PATIENCE = 5.0  # seconds that an unreadable file may stay unchanged before it counts as broken

# What changes while a file is written: size, time, inode.
_State = tuple[int, int, int]


class WatchedFolders:
    """Looks into folders again and again, at images there at the start too; never ends.

    A file is complete if it is equal at two looks and can be decoded; until then it may grow. One
    that is given up is new when it changes, as by a slow writer. A file that is removed is
    forgotten, so that a new one may have its name. Names that begin with a dot, and endings that
    are not of images, are of files that others still write.

    Args:
        folders: existing.
        period: seconds between two looks.
        patience: seconds before a file that does not change and cannot be read is given up.
        clock: seconds; for tests.
        sleep: waits for seconds; for tests.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        *,
        period: float = PERIOD,
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._folders = folders
        self._period, self._patience = period, patience
        self._clock, self._sleep = clock, sleep
        self._waiting: dict[Path, tuple[_State, float]] = {}
        self._done: set[Path] = set()
        self._broken: dict[Path, _State] = {}

    def __iter__(self) -> Iterator[tuple[Path, Pixels | DatasetError] | None]:
        """Each file with its pixels, uint8 ``[H, W, 3]`` in BGR order, or with the error.

        ``None`` follows each look, so that a caller can stop.
        """
        while True:
            there = {path for folder in self._folders for path in self._images_in(folder)}
            self._done &= there
            self._waiting = {path: since for path, since in self._waiting.items() if path in there}
            self._broken = {path: state for path, state in self._broken.items() if path in there}
            for path in sorted(there):
                if path not in self._done and (found := self._look(path)) is not None:
                    state, _ = self._waiting.pop(path)
                    if isinstance(found, DatasetError):
                        self._broken[path] = state
                    else:
                        self._done.add(path)
                    yield path, found
            yield None
            self._sleep(self._period)

    def _look(self, path: Path) -> Pixels | DatasetError | None:
        try:
            status = path.stat()
        except OSError:
            return None
        state, now = (status.st_size, status.st_mtime_ns, status.st_ino), self._clock()
        if self._broken.get(path) == state:
            return None
        before, since = self._waiting.get(path, (None, now))
        if state != before:
            self._waiting[path] = state, now
            return None
        try:
            return read_image(str(path), "BGR")
        except DatasetError as error:
            return error if now - since >= self._patience else None

    def _images_in(self, folder: Path) -> list[Path]:
        try:
            names = os.listdir(folder)
        except OSError:
            # A network folder may be away for a while: its images are not new afterwards.
            known = {*self._done, *self._waiting, *self._broken}
            return [path for path in known if path.parent == folder]
        return [
            folder / name
            for name in names
            if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)
        ]
