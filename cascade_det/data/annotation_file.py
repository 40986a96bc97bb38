"""Reading a json of annotations, or saying why it cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cascade_det.errors import DatasetError

# Bytes of memory per byte of file while it is read: measured on COCO's own kind of file, where most
# of the text is polygons. Other content takes more, so what is refused would surely not fit.
_MEMORY_PER_BYTE = 3

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def read_annotation_file(json_file: Path) -> dict[str, Any]:
    """Read the object at the top of a json; all in it that has the key ``segmentation`` loses it.

    Polygons are most of COCO's files and of their memory, and a detector of boxes has no use for
    them.

    Raises:
        DatasetError: the file cannot be read, does not fit in memory, is no json, or holds
            something else than an object.
    """
    content = read_json(json_file, _without_segmentation)
    if not isinstance(content, dict):
        raise DatasetError(f"{json_file}: is not COCO-format json: no object at the top")
    return content


def read_json(
    json_file: Path, object_hook: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> Any:
    """Read any json.

    Args:
        json_file: the file.
        object_hook: given every object in it, returns what takes its place.

    Raises:
        DatasetError: the file cannot be read, does not fit in memory, or is no json.
    """
    try:
        if not json_file.is_file():
            raise DatasetError(f"{json_file}: there is no such file")
        _check_memory(json_file)
        return json.loads(json_file.read_bytes(), object_hook=object_hook)
    except OSError as error:
        raise DatasetError(f"{json_file}: cannot be read: {error}") from error
    except MemoryError as error:
        raise DatasetError(f"{json_file}: does not fit in memory") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{json_file}: is not valid json: {error}") from error


def _without_segmentation(entry: dict[str, Any]) -> dict[str, Any]:
    entry.pop("segmentation", None)
    return entry


def _check_memory(json_file: Path) -> None:
    """Refuse what the system would kill the process for, which says nothing to the user."""
    needed, available = _MEMORY_PER_BYTE * json_file.stat().st_size, available_memory()
    if available is not None and needed > available:
        raise DatasetError(
            f"{json_file}: reading it takes at least {needed / 1e9:.1f} GB of memory, and "
            f"{available / 1e9:.1f} GB are free. Take out what detection of boxes does not need "
            "(such as 'segmentation'), or split it into several data sets."
        )


def available_memory() -> int | None:
    """Bytes that this process can still get, or None where the system does not say."""
    try:
        # "MemAvailable:    1234 kB"
        lines = _MEMINFO.read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):
        return None
    try:  # A container may be given less than its machine has.
        limit = (_CGROUP / "memory.max").read_text().strip()
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").open())
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(statistics["anon"]))
