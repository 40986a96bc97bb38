"""Names for the files of images, each different from the others."""

from __future__ import annotations

import os
import unicodedata

# Bytes, with an ending of 4: file names have 255 at most.
_LONGEST = 251


class UniqueStems:
    """Stems of file names, numbered where they are equal, or equal to some file systems.

    Stems that are too long for a name are cut. One of dots alone, which names a folder, gets ``_``
    for them.
    """

    def __init__(self) -> None:
        self._used: set[str] = set()
        self._counts: dict[str, int] = {}

    def add(self, stem: str) -> str:
        """The stem, or one like ``stem_2``."""
        stem = stem if stem.strip(".") else "_" * len(stem)
        name, number = _named(stem, ""), self._counts.get(_folded(stem), 1)
        while _folded(name) in self._used:
            number += 1
            name = _named(stem, f"_{number}")
        self._counts[_folded(stem)] = number
        self._used.add(_folded(name))
        return name


def _named(stem: str, number: str) -> str:
    while len(os.fsencode(f"{stem}{number}")) > _LONGEST:
        stem = stem[:-1]
    return f"{stem}{number}"


def _folded(name: str) -> str:
    """Equal for names that a file system may not tell apart: by case or composed letters."""
    return unicodedata.normalize("NFC", name).casefold()
