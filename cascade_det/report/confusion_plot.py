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
    size = len(classes)
    inches = float(np.clip(3.5 + 0.42 * size, 6, 20))
    figure = Figure(figsize=(inches + 0.8, inches), dpi=110)
    axes = figure.add_subplot()
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, shrink=0.7, label="% of the true class")
    axes.set(title="Confusion matrix", xlabel="detected as", ylabel="true class")
    if size <= _MOST_WITH_NAMES:
        names, families = with_fonts(printable(name, longest=_LONGEST_NAME) for name in classes)
        points = float(np.clip(500 / size, 5, 10))
        # Names may contain "$".
        style: dict[str, Any] = {"fontsize": points, "fontfamily": families, "parse_math": False}
        axes.set_xticks(range(size), names, rotation=90, **style)
        axes.set_yticks(range(size), names, **style)
    if size <= _MOST_WITH_NUMBERS:
        _write_numbers(axes, counts, shares)
    axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#dddddd", linewidth=0.4)
    axes.tick_params(which="minor", length=0)
    # The border of background.
    axes.axhline(size - 1.5, color="black", linewidth=0.8)
    axes.axvline(size - 1.5, color="black", linewidth=0.8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight")


def _write_numbers(
    axes: Axes, counts: npt.NDArray[np.int64], shares: npt.NDArray[np.float64]
) -> None:
    for row, column in np.argwhere(counts).tolist():
        axes.text(
            column,
            row,
            f"{counts[row, column]:,}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if shares[row, column] > 55 else "black",
        )
