"""Tables in Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from cascade_det.text import printable

Metrics = Mapping[str, Any]

_BEFORE_STAGES = ("preprocess", "backbone", "tile gate", "rpn")
_GATE_OR_STAGE = re.compile(r"(gate|stage)(\d+)")
_LONGEST_NAME = 48  # Characters of a class or a file in a table or a sentence.


def stage_names(metrics: Metrics) -> list[str]:
    """The keys ``stage0``, ``stage1``, ... of the results of an evaluator, in order."""
    names = [name for name in metrics if name.removeprefix("stage").isdigit()]
    return sorted(names, key=lambda name: int(name.removeprefix("stage")))


def part_order(part: str) -> tuple[int, int, str]:
    """Sort key of a part by the order in which a detector runs them; unknown ones come last."""
    if found := _GATE_OR_STAGE.fullmatch(part):
        return len(_BEFORE_STAGES), int(found[2]), found[1]
    if part in _BEFORE_STAGES:
        return _BEFORE_STAGES.index(part), 0, part
    return len(_BEFORE_STAGES) + 1, part != "postprocess", part


class Table(str):
    """A table in Markdown that also knows its cells, for other formats.

    Attributes:
        heading: above the table.
        headers: of the columns.
        rows: cells as they were given.
        floatfmt: one format for all numbers or one per column.
    """

    __slots__ = ("floatfmt", "headers", "heading", "rows")
    heading: str
    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]
    floatfmt: str | Sequence[str]


def table(
    title: str,
    headers: Sequence[str],
    rows: Sequence[Sequence[Any]],
    floatfmt: str | Sequence[str],
) -> Table:
    """A table below its title, with one format for all numbers or one per column.

    Texts are escaped and shortened, see :func:`shown_name`.
    """
    cells = [[_cell(value) if isinstance(value, str) else value for value in row] for row in rows]
    # A class may be named "007" or "1e5".
    texts = [i for i, column in enumerate(zip(*rows, strict=True)) if isinstance(column[0], str)]
    formatted = tabulate(
        cells, headers=headers, tablefmt="github", floatfmt=floatfmt, disable_numparse=texts
    )
    made = Table(f"**{title}**\n\n{formatted}")
    made.heading, made.headers, made.rows, made.floatfmt = title, headers, rows, floatfmt
    return made


def shown_name(text: str) -> str:
    """The name of a class or file, escaped and shortened for a table or a sentence."""
    return printable(text, longest=_LONGEST_NAME)


def _cell(text: str) -> str:
    return shown_name(text).replace("|", "\\|")
