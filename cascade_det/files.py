"""Files and folders that are either complete or absent."""

from __future__ import annotations

import csv
import ctypes
import fcntl
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from cascade_det.errors import CascadeDetError
from cascade_det.text import printable

# Names of temporary files. No other program uses them, and they are short enough for any folder.
_TEMPORARY = re.compile(r"\.cascade_det-[0-9a-f]{16}\.tmp")
# linux/fs.h
_RENAME_EXCHANGE = 2


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Make an OSError in the block name ``path`` instead of nothing or a temporary file."""
    try:
        yield
    except OSError as error:
        named = os.path.basename(os.fsdecode(error.filename or ""))
        if error.errno is not None and (not named or _TEMPORARY.fullmatch(named)):
            error.filename = os.fspath(path)
            del error.filename2
        raise


@contextmanager
def atomic_path(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it when the block succeeds.

    Missing folders are made. After an error, such as a full disk, ``path`` is as before. After the
    block, the content survives a crash of the machine. A replaced file passes on its mode; a link
    is replaced, not followed. Each writer has its own temporary file, so of several the last one
    wins. A killed process leaves its file behind, see :func:`remove_leftovers`.

    Args:
        path: the file to write.
        durable: wait for the disk; otherwise a crash of the machine can leave a damaged file.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with naming(target):
        mode = _mode_of(target)
        temporary, descriptor = _create(target.parent)
        try:
            if mode is not None:
                os.fchmod(descriptor, mode | stat.S_IRUSR | stat.S_IWUSR)
            yield temporary
            if durable:
                _sync(temporary)
            # Last, since some modes prevent opening the file.
            if mode is not None:
                temporary.chmod(mode)
            os.replace(temporary, target)
            if durable:
                _sync_names(target.parent)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(descriptor)


def _create(folder: Path) -> tuple[Path, int]:
    """A new locked file in a folder, and its descriptor."""
    while True:
        temporary = _temporary_name(folder)
        # Not mkstemp(), whose files are private: here the umask decides.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o666)
        _lock(descriptor, wait=True)
        # remove_leftovers() may have been faster than the lock.
        if temporary.exists():
            return temporary, descriptor
        os.close(descriptor)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, made: Collection[str]) -> Iterator[Path]:
    """Yield a new folder beside ``path`` that replaces it as a whole when the block succeeds.

    Otherwise ``path`` stays as it was. A killed process leaves the new folder behind, see
    :func:`remove_leftovers`.

    Args:
        path: the folder to make; its parents are made.
        made: names of the entries that the caller makes. An existing folder may hold only these,
            since all of it is replaced.

    Raises:
        CascadeDetError: ``path`` is not a folder, or holds other entries; before the block runs.
    """
    target = Path(os.path.realpath(path))
    check_replaceable(target, made)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(target.parent)
    with naming(target):
        temporary.mkdir()
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            _lock(descriptor, wait=True)
            yield temporary
            check_replaceable(target, made)
            if target.exists():
                shutil.copymode(target, temporary)
            _sync_tree(temporary)
            _exchange(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(descriptor)


def check_replaceable(folder: Path, made: Collection[str]) -> None:
    """Check that a folder, if it exists, has only entries named in ``made``.

    Raises:
        CascadeDetError: it has others, or is not a folder.
    """
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise CascadeDetError(f"{folder}: is not a folder. Give another one.")
    others = sorted(entry.name for entry in folder.iterdir() if entry.name not in made)
    if others:
        raise CascadeDetError(
            f"{folder}: holds {printable(others[0])}, which was not made here and would be lost. "
            "Give another folder, or move it away."
        )


def _sync_tree(folder: Path) -> None:
    """Flush all files and names in a folder to disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            _sync(os.path.join(place, name))
        _sync_names(place)


def _exchange(fresh: Path, target: Path) -> None:
    """Rename ``fresh`` to ``target``, and an existing ``target`` to ``fresh``."""
    if not target.exists():
        os.rename(fresh, target)
    elif not _exchange_at_once(fresh, target):
        # Not Linux, or a file system without exchange: for a moment neither exists.
        aside = _temporary_name(target.parent)
        os.rename(target, aside)
        os.rename(fresh, target)
        os.rename(aside, fresh)
    _sync_names(target.parent)


def _exchange_at_once(first: Path, second: Path) -> bool:
    try:
        rename = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    here = -100  # AT_FDCWD
    names = os.fsencode(first.absolute()), os.fsencode(second.absolute())
    return rename(here, names[0], here, names[1], _RENAME_EXCHANGE) == 0


def move_into_place(finished: Path, target: Path) -> None:
    """Replace ``target`` by ``finished``, a file in the same folder, atomically and durably."""
    _sync(finished)
    os.replace(finished, target)
    _sync_names(target.parent)


def _sync_names(folder: str | Path) -> None:
    # Some network file systems cannot flush a folder; its files are in place already.
    with suppress(OSError):
        _sync(folder)


def _sync(path: str | os.PathLike[str]) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove what killed :func:`atomic_path` and :func:`atomic_folder` left in ``folder``.

    Only their temporary names are removed, and only if no process is writing them: a writer holds
    a lock, which ends with its process. A process id would be no proof: it may be reused, and in a
    container it is the same after every start.

    Args:
        folder: where the complete files are, not searched recursively; it may be missing.
    """
    for path in Path(folder).glob(".cascade_det-*.tmp"):
        if not _TEMPORARY.fullmatch(path.name):
            continue
        # Its writer may rename it at any time, and it may belong to another user.
        with suppress(OSError):
            _remove_if_left(path)


def _remove_if_left(path: Path) -> None:
    # A link is refused, and opening a FIFO does not block.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or not _lock(descriptor):
            return
        if stat.S_ISDIR(mode):
            shutil.rmtree(path)
        else:
            path.unlink()
    finally:
        os.close(descriptor)


def _temporary_name(folder: Path) -> Path:
    return folder / f".cascade_det-{secrets.token_hex(8)}.tmp"


def _mode_of(path: Path) -> int | None:
    """Permissions of a regular file; ``None`` if there is none, or a link."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return stat.S_IMODE(found.st_mode) if stat.S_ISREG(found.st_mode) else None


def write_json(value: Any, path: str | os.PathLike[str], *, indent: int | None = None) -> None:
    """Write strict JSON: nan and infinities become ``null``."""
    text = json.dumps(_plain(value), allow_nan=False, indent=indent)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_csv(
    path: str | os.PathLike[str], headers: Sequence[str], rows: Iterable[Sequence[Any]]
) -> None:
    """Write a table; ``None`` and nan are empty cells.

    An apostrophe precedes text that a spreadsheet would compute because it begins with ``=``,
    ``+``, ``-`` or ``@``. Unprintable characters are escaped.
    """
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([_cell(header) for header in headers])
        writer.writerows([_cell(value) for value in row] for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        return ""
    if not isinstance(value, str):
        return value
    return printable(f"'{value}" if value.startswith(tuple("=+-@\t\r")) else value)


def _lock(descriptor: int, *, wait: bool = False) -> bool:
    """Lock until the file is closed; ``False`` if another process holds it, or without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
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
