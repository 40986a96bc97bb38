"""Files that are either complete or not there."""

from __future__ import annotations

import csv
import fcntl
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let an OSError within the block name ``path`` if it has none, as one of a write."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it when the block succeeds.

    The folder is made where it is missing. After an error, a full disk included, ``path`` is as it
    was before. Once the block has ended, what was written survives a crash of the machine. A killed
    process leaves its temporary file behind, see :func:`remove_leftovers`.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with naming(target), temporary.open("ab") as held:
        try:
            _lock(held.fileno())
            yield temporary
            move_into_place(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def move_into_place(finished: Path, target: Path) -> None:
    """Let ``finished``, a file in the same folder, replace ``target`` at once and for good.

    Bytes and name survive a crash of the machine.
    """
    with finished.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(finished, target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        # The file is in its place already. Some network file systems cannot do this to a folder.
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove the temporary files of :func:`atomic_path` in ``folder`` that nobody writes any more.

    A writer holds a lock on its file, which ends with its process. The number of the process says
    less: another one may have it by now, and in a container it is the same after every start.

    Args:
        folder: where the complete files are; folders below it are left alone. It may be missing.
    """
    for path in Path(folder).glob(".*.tmp"):
        if not _TEMPORARY.fullmatch(path.name):
            continue
        # The file may vanish at any time: its writer renames it.
        with suppress(FileNotFoundError), path.open("rb") as file:
            if _lock(file.fileno()):
                path.unlink()


def write_json(value: Any, path: str | os.PathLike[str], *, indent: int | None = None) -> None:
    """Write ``value`` as JSON that every reader accepts: nan and infinities become ``null``."""
    text = json.dumps(_plain(value), allow_nan=False, indent=indent)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_csv(
    path: str | os.PathLike[str], headers: Sequence[str], rows: Iterable[Sequence[Any]]
) -> None:
    """Write a table; ``None`` and nan are empty cells."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(headers)
        writer.writerows([_cell(value) for value in row] for row in rows)


def _cell(value: Any) -> Any:
    return "" if isinstance(value, float) and math.isnan(value) else value


def _lock(descriptor: int) -> bool:
    """Lock a file until it is closed; ``False`` if another has it, or if locks are unknown here."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
