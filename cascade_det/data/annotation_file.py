"""Reads a json of annotations, or says why it cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cascade_det.errors import DatasetError
from cascade_det.masks.segmentation import compact_polygons

# Bytes of memory per byte of json, measured on COCO's files, which are mostly polygons. Other
# content takes more, so a refused file would not fit.
_MEMORY_PER_BYTE = 3

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_MEMINFO = Path("/proc/meminfo")


def read_annotation_file(json_file: Path, *, masks: bool = False) -> dict[str, Any]:
    """Read a json with an object at the top level.

    Polygons take up most of COCO's files, and a box detector does not need them.

    Args:
        json_file: the file.
        masks: whether to keep the keys ``segmentation``, with polygons as arrays.

    Raises:
        DatasetError: the file cannot be read, does not fit in memory, is not json, or has no
            object at the top level.
    """
    content = read_json(json_file, compact_polygons if masks else _without_segmentation)
    if not isinstance(content, dict):
        raise DatasetError(f"{json_file}: is not COCO-format json: no object at the top")
    return content


def read_json(
    json_file: Path, object_hook: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> Any:
    """Read any json.

    Args:
        json_file: the file.
        object_hook: called with every object in it, returns its replacement.

    Raises:
        DatasetError: the file cannot be read, does not fit in memory, or is not json.
    """
    try:
        if not json_file.is_file():
            raise DatasetError(f"{json_file}: there is no such file")
        check_memory(json_file)
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


def check_memory(json_file: Path) -> None:
    """Refuse a file that is too large: the system would kill the process without a message.

    Raises:
        DatasetError: the file does not fit in memory.
    """
    needed, available = _MEMORY_PER_BYTE * json_file.stat().st_size, available_memory()
    if available is not None and needed > available:
        raise DatasetError(
            f"{json_file}: reading it takes at least {needed / 1e9:.1f} GB of memory, and at most "
            f"{available / 1e9:.1f} GB are available. Remove keys that box detection does not need "
            "(such as 'segmentation'), or split it into several data sets."
        )


def available_memory() -> int | None:
    """Bytes that this process can get at most; ``None`` if the system does not say."""
    try:
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        available = 1024 * int(fields["MemAvailable"].split()[0])  # "1234 kB"
    except (OSError, KeyError, ValueError):
        return None
    try:  # A container may be limited to less than its machine has.
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        return available
    return available if limit == "max" else min(available, int(limit))
