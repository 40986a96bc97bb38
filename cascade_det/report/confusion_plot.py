"""The confusion matrix as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cascade_det.files import atomic_path
from cascade_det.report.fonts import with_fonts
from cascade_det.text import printable

# With more classes the numbers would be illegible; the CSV has them.
_MOST_WITH_NUMBERS = 30
_MOST_WITH_NAMES = 150
_LONGEST_NAME = 24


def plot_confusion(
    classes: Sequence[str], counts: npt.NDArray[np.int64], path: str | os.PathLike[str]
) -> None:
    """Draw a confusion matrix as a PNG: a row per true class, coloured by shares of the row.

    Args:
        classes: names, the last one background.
        counts: int64 ``[len(classes), len(classes)]``, true by detected.
        path: the PNG; its folder is made where it is missing, an old file is replaced.
    """
    figure, axes, shares = _drawn(classes, counts, "detected as")
    if len(classes) <= _MOST_WITH_NUMBERS:
        _write_numbers(axes, counts, shares, [f"{n:,}" for n in counts[counts > 0].tolist()])
    # The border of background.
    axes.axhline(len(classes) - 1.5, color="black", linewidth=0.8)
    axes.axvline(len(classes) - 1.5, color="black", linewidth=0.8)
    _save(figure, path)


def plot_pixel_confusion(
    classes: Sequence[str], counts: npt.NDArray[np.int64], path: str | os.PathLike[str]
) -> None:
    """As ``plot_confusion``, of the pixels of a segmenter: with shares, which are legible.

    Args:
        classes: names.
        counts: int64 ``[len(classes), len(classes)]``, true by predicted.
        path: the PNG.
    """
    figure, axes, shares = _drawn(classes, counts, "predicted as")
    if len(classes) <= _MOST_WITH_NUMBERS:
        texts = [f"{share:.1f}" if share >= 0.05 else "" for share in shares[counts > 0].tolist()]
        _write_numbers(axes, counts, shares, texts)
    _save(figure, path)


def _drawn(
    classes: Sequence[str], counts: npt.NDArray[np.int64], label: str
) -> tuple[Figure, Axes, npt.NDArray[np.float64]]:
    """The coloured matrix with names, and its shares in percent."""
    size = len(classes)
    inches = float(np.clip(3.5 + 0.42 * size, 6, 20))
    figure = Figure(figsize=(inches + 0.8, inches), dpi=110)
    axes = figure.add_subplot()
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, shrink=0.7, label="% of the true class")
    axes.set(title="Confusion matrix", xlabel=label, ylabel="true class")
    if size <= _MOST_WITH_NAMES:
        names, families = with_fonts(printable(name, longest=_LONGEST_NAME) for name in classes)
        points = float(np.clip(500 / size, 5, 10))
        # Names may contain "$".
        style: dict[str, Any] = {"fontsize": points, "fontfamily": families, "parse_math": False}
        axes.set_xticks(range(size), names, rotation=90, **style)
        axes.set_yticks(range(size), names, **style)
    axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#dddddd", linewidth=0.4)
    axes.tick_params(which="minor", length=0)
    return figure, axes, shares


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight")


def _write_numbers(
    axes: Axes,
    counts: npt.NDArray[np.int64],
    shares: npt.NDArray[np.float64],
    texts: Sequence[str],
) -> None:
    """Write a text into each cell that is not 0, row by row."""
    for (row, column), text in zip(np.argwhere(counts).tolist(), texts, strict=True):
        axes.text(
            column,
            row,
            text,
            ha="center",
            va="center",
            fontsize=8,
            color="white" if shares[row, column] > 55 else "black",
        )
