"""Fonts for matplotlib, whose default has no Chinese, Japanese, Korean or Thai characters."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

from cascade_det.text import printable

# It logs a line for each family without a regular weight; any weight will do here.
logging.getLogger(font_manager.__name__).setLevel(logging.ERROR)


def with_fonts(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    r"""Texts that can be drawn, and the installed fonts that they need.

    Args:
        texts: any.

    Returns:
        The texts, with characters that no font has written as ``\u0e41``, and the names of font
        families for the argument ``fontfamily``, the default one first.
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
    """Families by name, except those that draw a box for every character."""
    names = {entry.name for entry in font_manager.fontManager.ttflist}
    return sorted(name for name in names if not name.startswith("Last Resort"))


def _letters(family: str) -> set[str]:
    """The characters of the font that matplotlib uses for a family."""
    path = font_manager.findfont(font_manager.FontProperties(family=[family]))
    return {chr(code) for code in FT2Font(path).get_charmap()}
