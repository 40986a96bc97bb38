"""Letters in pictures of matplotlib, whose own font has no Chinese, Japanese, Korean or Thai."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

from cascade_det.text import printable

# Which weight of a family is taken does not matter here; it would be a line for each of them.
logging.getLogger(font_manager.__name__).setLevel(logging.ERROR)


def with_fonts(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    r"""Texts as they can be drawn, and the installed fonts that it takes.

    Args:
        texts: any.

    Returns:
        The texts, in which letters that no font has are written as ``\u0e41``, and names of
        families, the default one first, for the argument ``fontfamily``.
    """
    shown = [printable(text) for text in texts]
    families = list(font_manager.FontProperties().get_family())
    missing = set("".join(shown)) - _letters(families[0])
    for family in _installed() if missing else ():
        if found := missing & _letters(family):
            families.append(family)
            missing -= found
    escapes = {ord(letter): letter.encode("unicode_escape").decode() for letter in missing}
    return [text.translate(escapes) for text in shown], families


def _installed() -> list[str]:
    """Families in the order of their names, but those that have a box for every letter."""
    names = {entry.name for entry in font_manager.fontManager.ttflist}
    return sorted(name for name in names if not name.startswith("Last Resort"))


def _letters(family: str) -> set[str]:
    """What the font has that matplotlib takes for a family."""
    path = font_manager.findfont(font_manager.FontProperties(family=[family]))
    return {chr(code) for code in FT2Font(path).get_charmap()}
