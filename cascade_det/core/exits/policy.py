"""When a region may leave the cascade before its last stage."""

from __future__ import annotations

import torch
from torch import Tensor

from cascade_det.core.structures import EXIT_REASONS

STAY = -1
BACKGROUND = EXIT_REASONS.index("background")
CONFIDENT = EXIT_REASONS.index("confident")
COMPLETED = EXIT_REASONS.index("completed")


class ConfidenceExit:
    """Leaves by the largest foreground probability over the stages seen so far.

    The probabilities are those of the cascade's score ensemble: by default the mean of the stages.

    Below ``prune_thresholds[s]`` a region is background and is dropped after stage s; from
    ``thresholds[s]`` upwards it is kept as it is. A prune threshold of 0 and a threshold above 1
    switch the respective exit off at that stage.

    Args:
        thresholds: one for each stage but the last.
        prune_thresholds: likewise.
    """

    def __init__(
        self, *, thresholds: tuple[float, ...], prune_thresholds: tuple[float, ...]
    ) -> None:
        if len(thresholds) != len(prune_thresholds):
            raise ValueError(
                f"{len(thresholds)} thresholds but {len(prune_thresholds)} prune thresholds"
            )
        self.thresholds = tuple(thresholds)
        self.prune_thresholds = tuple(prune_thresholds)

    def decide(self, stage: int, probs: Tensor) -> Tensor:
        """Who leaves after ``stage``, which is not the last.

        Args:
            stage: from 0.
            probs: float32 ``[R, K + 1]``, of the stages up to this one; the last is background.

        Returns:
            int64 ``[R]``: an index into ``EXIT_REASONS``, or ``STAY``.
        """
        best = probs[:, :-1].max(dim=1).values
        reasons = torch.full_like(best, STAY, dtype=torch.int64)
        reasons[best >= self.thresholds[stage]] = CONFIDENT
        reasons[best < self.prune_thresholds[stage]] = BACKGROUND
        return reasons
