"""The greedy matching against a loop over all pairs."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_det.core.matching import match_greedily


def plain_matching(ious, threshold, preferred):
    """The candidate of each box: highest IoU, then preferred ones, then the first column."""
    free, taken = set(range(ious.shape[1])), []
    for row, row_preferred in zip(ious.tolist(), preferred.tolist(), strict=True):
        best = -1
        for column in sorted(free):
            rank = row[column], row_preferred[column]
            if row[column] >= threshold and (best < 0 or rank > (row[best], row_preferred[best])):
                best = column
        free.discard(best)
        taken.append(best)
    return taken


@settings(max_examples=200)
@given(seed=st.integers(0, 10_000), boxes=st.integers(0, 6), candidates=st.integers(0, 6))
def test_it_equals_a_loop_over_all_pairs(seed, boxes, candidates):
    rng = np.random.default_rng(seed)
    # Few values, so that many are equal; -1 is a pair that must not match.
    ious = rng.choice([-1.0, 0.0, 0.4, 0.5, 0.6, 0.75], (boxes, candidates))
    preferred, thresholds = rng.random(ious.shape) < 0.4, (0.5, 0.4, 0.75)
    taken = match_greedily(
        torch.from_numpy(ious), thresholds, preferred=torch.from_numpy(preferred)
    )
    assert taken.tolist() == [plain_matching(ious, t, preferred) for t in thresholds]
    none = np.zeros_like(preferred)
    assert match_greedily(torch.from_numpy(ious), [0.5]).tolist() == [
        plain_matching(ious, 0.5, none)
    ]
