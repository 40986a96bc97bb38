"""Image files from the names of files, of folders and globs."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from cascade_det.data.image_names import IMAGE_SUFFIXES
from cascade_det.errors import DatasetError


def find_images(patterns: Sequence[str]) -> list[Path]:
    """Image files from names of files, of folders and globs; in order, each once.

    A name that exists is not a glob, even with brackets in it; nor are existing folders at the
    start of a glob.

    Raises:
        DatasetError: a pattern matches no image.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        images = [image for path in matching(pattern) for image in _images_at(path)]
        if not images:
            raise nothing_found(pattern)
        found.update(dict.fromkeys(images))
    return list(found)


def matching(pattern: str) -> list[Path]:
    """The path itself if it exists, else what the glob matches, in order."""
    path = Path(pattern)
    return [path] if path.exists() else [Path(p) for p in sorted(glob.glob(_escaped(path)))]


def nothing_found(pattern: str) -> DatasetError:
    """The error for a pattern that matches nothing."""
    return DatasetError(f"--input {pattern}: is neither an existing file nor a folder with images")


def _escaped(path: Path) -> str:
    """The glob with its existing leading folders escaped."""
    folder = next((parent for parent in path.parents if parent.exists()), Path())
    return os.path.join(glob.escape(str(folder)), path.relative_to(folder))


def _images_at(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    return [path] if path.is_file() else []
