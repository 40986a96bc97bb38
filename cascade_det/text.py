"""Makes text from files and file names safe to show."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

# Marks that change the direction of the surrounding text, so that it reads as something else.
_BIDI_MARKS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# Control characters, lone surrogates, separators of lines and of paragraphs.
_UNPRINTABLE = frozenset(("Cc", "Cs", "Zl", "Zp"))

LONGEST_NAME = 255  # characters


def printable(text: str, *, longest: int = 0, lines: bool = False) -> str:
    r"""Escape characters that control a terminal, break an encoder or deceive a reader.

    Control characters, bidirectional marks and lone surrogates (bytes of a file name that are not
    UTF-8) become ``\x1b``, ``\u202e``, ``\udcf6``; everything else stays.

    Args:
        text: any string.
        longest: shorten longer text to this many characters, in its middle; 0: never.
        lines: keep line breaks and tabs.
    """
    kept = "\n\t" if lines else ""
    shown = "".join(c if c in kept or not _is_unprintable(c) else _escaped(c) for c in text)
    if longest and len(shown) > longest:
        tail = (longest - 1) // 2
        shown = shown[: longest - 1 - tail] + "…" + (shown[-tail:] if tail else "")
    return shown


def listed(texts: Sequence[str], most: int, separator: str = ", ") -> str:
    """Some of many texts, such as ``a, b, c and 4 more``.

    Args:
        texts: if empty, so is the result.
        most: how many to show, from the first on.
        separator: between them.
    """
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more


def check_name(name: Any) -> str:
    """Return the name of a class as it is.

    Raises:
        ValueError: ``name`` is not a string, is empty or longer than 255 characters, or has
            characters that cannot be shown.
    """
    if not isinstance(name, str):
        raise ValueError(f"{printable(repr(name), longest=60)} is not text")
    if not name.strip():
        raise ValueError("it is empty")
    if len(name) > LONGEST_NAME:
        shown = printable(name, longest=40)
        raise ValueError(f"{shown} has {len(name):,} characters, and {LONGEST_NAME} are the most")
    if any(map(_is_unprintable, name)):
        raise ValueError(f"{printable(name)} has control characters, or is not valid Unicode")
    return name


def _is_unprintable(character: str) -> bool:
    return character in _BIDI_MARKS or unicodedata.category(character) in _UNPRINTABLE


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
