"""The greedy matching of boxes that all metrics share. N boxes, M candidates, T IoU thresholds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def match_greedily(
    ious: npt.NDArray[np.float64],
    thresholds: Sequence[float],
    *,
    preferred: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.int64]:
    """Give each box, in order, the free candidate that overlaps it most.

    Args:
        ious: float64 ``[N, M]``, above 0 for pairs that may match; best box first.
        thresholds: T IoUs above 0; each has a matching of its own, of pairs that reach it.
        preferred: bool ``[N, M]``, candidates that come first among equal IoUs. After that, the
            first column comes first.

    Returns:
        int64 ``[T, N]``, the column that each box takes; -1 for none.
    """
    taken = np.full((len(thresholds), len(ious)), -1)
    rows, columns = np.nonzero(ious >= min(thresholds))
    values = ious[rows, columns]
    second = np.zeros(len(rows), bool) if preferred is None else ~preferred[rows, columns]
    order = np.lexsort((columns, second, -values, rows))
    pairs = list(
        zip(rows[order].tolist(), columns[order].tolist(), values[order].tolist(), strict=True)
    )
    for level, threshold in enumerate(thresholds):
        matched: dict[int, int] = {}
        used: set[int] = set()
        for row, column, value in pairs:
            if value >= threshold and row not in matched and column not in used:
                matched[row] = column
                used.add(column)
        taken[level, list(matched)] = list(matched.values())
    return taken
