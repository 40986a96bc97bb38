"""Tables in Markdown, and what they are made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tabulate import tabulate

Figures = Mapping[str, Any]


def stage_names(figures: Figures) -> list[str]:
    """The keys ``stage0``, ``stage1``, ... of the results of an evaluator, in order."""
    names = [name for name in figures if name.removeprefix("stage").isdigit()]
    return sorted(names, key=lambda name: int(name.removeprefix("stage")))


def table(
    title: str,
    headers: Sequence[str],
    rows: Sequence[Sequence[Any]],
    floatfmt: str | Sequence[str],
) -> str:
    """A table below its title; one format for all figures, or one per column."""
    formatted = tabulate(rows, headers=headers, tablefmt="github", floatfmt=floatfmt)
    return f"**{title}**\n\n{formatted}"


def percent(shares: Iterable[float]) -> list[float]:
    """Shares from 0 to 1 in percent."""
    return [100 * share for share in shares]
