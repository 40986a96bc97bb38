"""A page of sections as one HTML file that loads nothing and runs no script.

Texts come from data: names of classes and files, values of a configuration. The templates escape
all of them, and a policy in the page forbids scripts and requests, should one be forgotten.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cascade_det import __version__
from cascade_det.files import atomic_path
from cascade_det.report.tables import Table
from cascade_det.text import printable

REPORT_FILE = "report.html"
NOTHING = "-"  # For a number that is not defined.

# In a confusion matrix.
_MOST_CLASSES = 30
_LONGEST_HEADER = 24  # Characters.
_TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        title: above it; may be empty.
        headers: of the columns.
        rows: cells as text; the first column is a name.
        marked: indices of rows to emphasise.
        of_text: whether the other columns are text, which begins at the left.
    """

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[int] = frozenset()
    of_text: bool = False


@dataclass(frozen=True)
class Plots:
    """Charts beside each other, see ``charts``; three in a row if they are ``small``."""

    charts: Sequence[Any]
    small: bool = False


@dataclass(frozen=True)
class Picture:
    """Pictures of one size beside each other, where there is room, below a caption.

    Attributes:
        caption: of all.
        sources: data URIs.
        names: what each shows.
        width: in pixels.
        height: in pixels.
    """

    caption: str
    sources: Sequence[str]
    names: Sequence[str]
    width: int
    height: int


@dataclass(frozen=True)
class Pictures:
    """Pictures below each other."""

    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Heat:
    """A confusion matrix.

    Attributes:
        column: what the columns are, such as "detected as".
        classes: names.
        rows: for each class its name, and the text and the share (0 to 1) of each cell.
        note: where only some classes are shown.
    """

    column: str
    classes: Sequence[str]
    rows: Sequence[tuple[str, Sequence[tuple[str, float]]]]
    note: str = ""

    @classmethod
    def of(cls, classes: Sequence[str], counts: Sequence[Sequence[int]], column: str) -> Heat:
        """Of many classes, those that are confused most, and the last one, the background."""
        size = len(classes)
        shown, note = list(range(size)), ""
        if size > _MOST_CLASSES:
            wrong = [sum(counts[i]) - counts[i][i] for i in range(size - 1)]
            worst = sorted(range(size - 1), key=lambda i: -wrong[i])[: _MOST_CLASSES - 1]
            shown = [*sorted(worst), size - 1]
            note = f"The {len(shown)} of {size} classes with the most mistakes are shown."
        rows = []
        for true in shown:
            whole = sum(counts[true]) or 1
            cells = [(_count(counts[true][k]), round(counts[true][k] / whole, 3)) for k in shown]
            rows.append((classes[true], cells))
        names = [printable(classes[k], longest=_LONGEST_HEADER) for k in shown]
        return cls(column, names, rows, note)


@dataclass(frozen=True)
class Preformatted:
    """The content of a file as it is."""

    title: str
    content: str


@dataclass(frozen=True)
class Folded:
    """Blocks that are shown on request."""

    summary: str
    blocks: Sequence[Any]


@dataclass
class Section:
    """A part of a page with an entry in its table of contents.

    Attributes:
        key: its address in the page, letters only.
        title: of the section.
        blocks: text, or an instance of one of the classes above.
    """

    key: str
    title: str
    blocks: list[Any] = field(default_factory=list)


def write_page(
    path: str | os.PathLike[str],
    title: str,
    facts: Sequence[tuple[str, str]],
    sections: Sequence[Section],
) -> None:
    """Write a page; an old file is replaced in one step.

    Args:
        path: of the HTML file.
        title: of the page.
        facts: names and values, shown as a row of figures below the title.
        sections: those without blocks are left out.
    """
    text = render(title, facts, sections)
    with atomic_path(path) as temporary:
        # Lone surrogates were escaped by ``_shown``.
        temporary.write_text(text, encoding="utf-8")


def render(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """The HTML of a page; arguments as for ``write_page``."""
    template = _environment().get_template("page.html")
    return template.render(
        title=title,
        facts=facts,
        sections=[section for section in sections if section.blocks],
        style=Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8")),
        version=__version__,
    )


def as_grid(made: Table) -> Grid:
    """A table of the log."""
    formats = made.floatfmt
    per_column = [formats] * len(made.headers) if isinstance(formats, str) else list(formats)
    per_column += per_column[-1:] * (len(made.headers) - len(per_column))
    rows = [
        [number(value, form) for value, form in zip(row, per_column, strict=True)]
        for row in made.rows
    ]
    return Grid(made.heading, made.headers, rows)


def number(value: Any, form: str = "") -> str:
    """A cell: a number in a format, whole numbers with separators, text as it is."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NOTHING
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:{form or '.4g'}}"


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["text"] = lambda block: isinstance(block, str)
    for kind in (Grid, Heat, Plots, Pictures, Preformatted, Folded):
        environment.tests[kind.__name__.lower()] = _is_a(kind)
    return environment


def _count(number_of: int) -> str:
    return f"{number_of:,}" if number_of else ""


def _is_a(kind: type) -> Any:
    return lambda block: isinstance(block, kind)


def _shown(value: Any) -> Any:
    """What an expression of a template writes, before it is escaped."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    # Marks of direction would make a name read as another one.
    return printable(value, lines=True)
