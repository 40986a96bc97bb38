"""Rules that drop a region as background."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cascade_det.core.exits.view import RegionView


class PruneBelow:
    """Drops what no foreground class gives a probability of ``thresholds[gate]``.

    Before stage 0, where there are no classes yet, the objectness is looked at.

    Args:
        thresholds: in [0, 1], one for each gate: before stage 0, after stage 0, ...; 0 is never.
    """

    reason = "background"

    def __init__(self, thresholds: Sequence[float]) -> None:
        self.thresholds = tuple(thresholds)

    def is_active(self, stage: int) -> bool:
        """Whether anything may leave after ``stage`` (-1: before the first)."""
        return self.thresholds[stage + 1] > 0

    def leaves(self, view: RegionView) -> Tensor:
        """Bool ``[R]``."""
        return view.scores < self.thresholds[view.stage + 1]


class KeepNearBest:
    """Drops what scores less than the k-th best of its image by more than ``margins[gate]``.

    The two-line heuristic of learning to rank, "early exit by proximity threshold" (Cambazoglu et
    al., WSDM 2010), that LEAR (arXiv 2105.02568) is compared with. An image with k regions or
    fewer keeps them all.

    Args:
        margins: p in [0, 1] for each gate, as in ``PruneBelow``; 1 is never.
        best: k, at least 1.
    """

    reason = "background"

    def __init__(self, margins: Sequence[float], *, best: int) -> None:
        self.margins = tuple(margins)
        self.best = best

    def is_active(self, stage: int) -> bool:
        """Whether anything may leave after ``stage`` (-1: before the first)."""
        return self.margins[stage + 1] < 1

    def leaves(self, view: RegionView) -> Tensor:
        """Bool ``[R]``."""
        # A sum over one region each: no index whose length a GPU would have to tell first.
        kth_best = view.scores.new_zeros(view.num_images)
        kth_best.index_add_(0, view.image_index, view.scores * (view.ranks == self.best - 1))
        return view.scores < kth_best[view.image_index] - self.margins[view.stage + 1]
