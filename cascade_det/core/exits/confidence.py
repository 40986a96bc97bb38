"""The rule that takes a region as it is: its class is certain, and its box is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cascade_det.core.exits.view import RegionView

Measure = Callable[[RegionView], Tensor]


def max_prob(view: RegionView) -> Tensor:
    """``[R]`` in [0, 1]: the largest foreground probability."""
    return view.scores


def entropy(view: RegionView) -> Tensor:
    """``[R]`` in [0, 1]: 1 less the entropy over all classes, normalised by its maximum.

    The normalised entropy of EENet (arXiv 2301.07099); 0 where background is the most probable.
    """
    probs = view.probs
    assert probs is not None
    negative = torch.special.xlogy(probs, probs).sum(dim=1)
    certainty = 1 + negative / torch.log(torch.tensor(float(probs.shape[1])))
    return certainty.clamp(min=0) * view.is_foreground


def margin(view: RegionView) -> Tensor:
    """``[R]`` in [0, 1]: how far the most probable class leads; 0 where that is background."""
    assert view.probs is not None
    first, second = view.probs.topk(2, dim=1).values.unbind(dim=1)
    return (first - second) * view.is_foreground


def agreement(view: RegionView) -> Tensor:
    """``[R]``: stages in a row before this one that gave the same foreground class.

    The patience of PABEE (arXiv 2006.04152), as a number of stages; 0 for background.
    """
    assert view.agreements is not None
    return (view.agreements * view.is_foreground).float()


MEASURES: dict[str, Measure] = {
    "max_prob": max_prob,
    "entropy": entropy,
    "margin": margin,
    "agreement": agreement,
}


def refinement(view: RegionView) -> Tensor:
    """``[R]`` in [0, 1]: IoU of the box with the one that the stage refined it from."""
    return view.refinement_ious


def predicted_iou(view: RegionView) -> Tensor:
    """``[R]`` in [0, 1]: IoU of the box with its object, as a head predicts it."""
    assert view.predicted_ious is not None
    return view.predicted_ious


LOCALISATIONS: dict[str, Measure] = {"refinement": refinement, "predicted_iou": predicted_iou}


class AcceptConfident:
    """Accepts what reaches ``thresholds[stage]`` and, where asked for, is well localised.

    Args:
        confidence: how certain the class is, such as one of ``MEASURES``.
        thresholds: one for each stage but the last.
        localisation: how well the box fits, such as one of ``LOCALISATIONS``, or ``None``.
        localisation_thresholds: likewise, of ``localisation``.
    """

    reason = "confident"

    def __init__(
        self,
        confidence: Measure,
        thresholds: Sequence[float],
        localisation: Measure | None = None,
        localisation_thresholds: Sequence[float] = (),
    ) -> None:
        self.confidence = confidence
        self.thresholds = tuple(thresholds)
        self.localisation = localisation
        self.localisation_thresholds = tuple(localisation_thresholds)

    def is_active(self, stage: int) -> bool:
        """Whether anything may leave after ``stage``: not before there are classes."""
        return stage >= 0

    def leaves(self, view: RegionView) -> Tensor:
        """Bool ``[R]``."""
        ready = self.confidence(view) >= self.thresholds[view.stage]
        if self.localisation is None:
            return ready
        return ready & (self.localisation(view) >= self.localisation_thresholds[view.stage])
