"""Rules that drop regions as background."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cascade_det.core.exits.confidence import Measure, max_prob, on_live
from cascade_det.core.exits.view import RegionView


class PruneBelow:
    """Drops regions whose foreground probabilities are all below ``thresholds[gate]``.

    Before stage 0 the objectness takes the place of the probability.

    Args:
        thresholds: in [0, 1], one per gate: before stage 0, after stage 0, ...; 0 is off.
        measure: what the thresholds apply to, ``[R]`` in [0, 1].
    """

    reason = "background"

    def __init__(self, thresholds: Sequence[float], measure: Measure = max_prob) -> None:
        self.thresholds = tuple(thresholds)
        self.measure = measure

    def is_active(self, stage: int) -> bool:
        """Whether regions can exit after ``stage`` (-1: before stage 0)."""
        return self.thresholds[stage + 1] > 0

    def exit_mask(self, view: RegionView) -> Tensor:
        """Bool ``[R]``."""
        return on_live(self.measure, view) < self.thresholds[view.stage + 1]


class KeepNearBest:
    """Drops regions that score lower than the k-th best of their image by over ``margins[gate]``.

    "Early exit by proximity threshold" of learning to rank (Cambazoglu et al., WSDM 2010), a
    baseline of LEAR (arXiv 2105.02568). Images with at most k regions keep them all.

    Args:
        margins: in [0, 1], one per gate as in ``PruneBelow``; 1 is off.
        best: k, at least 1.
    """

    reason = "background"

    def __init__(self, margins: Sequence[float], *, best: int) -> None:
        self.margins = tuple(margins)
        self.best = best

    def is_active(self, stage: int) -> bool:
        """Whether regions can exit after ``stage`` (-1: before stage 0)."""
        return self.margins[stage + 1] < 1

    def exit_mask(self, view: RegionView) -> Tensor:
        """Bool ``[R]``."""
        # [N]. A sum over one region per image: its shape does not depend on values on the GPU.
        kth_best = view.scores.new_zeros(view.num_images)
        is_kth = view.ranks == self.best - 1
        if view.gone is not None:  # the ranks of too few live regions go on with those
            is_kth &= ~view.gone
        kth_best.index_add_(0, view.image_index, view.scores * is_kth)
        return view.scores < kth_best[view.image_index] - self.margins[view.stage + 1]
