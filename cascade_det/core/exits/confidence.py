"""The rule that accepts a region early: its class is confident, and its box well localised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade_det.core.exits.view import RegionView

Measure = Callable[[RegionView], Tensor]


def max_prob(view: RegionView) -> Tensor:
    """``[R]`` in [0, 1]: the largest foreground probability."""
    return view.scores


def entropy(view: RegionView) -> Tensor:
    """``[R]`` in [0, 1]: 1 minus the entropy over all classes, normalised by its maximum.

    The normalised entropy of EENet (arXiv 2301.07099); 0 where background is most probable.
    """
    assert view.probs is not None
    maximum = torch.log(torch.tensor(float(view.probs.shape[1])))
    return (1 - view.entropy / maximum).clamp(min=0) * view.is_foreground


def margin(view: RegionView) -> Tensor:
    """``[R]`` in [0, 1]: lead of the most probable class; 0 where that is background."""
    return view.margin * view.is_foreground


def agreement(view: RegionView) -> Tensor:
    """``[R]``: number of consecutive stages before with the same foreground class.

    The patience of PABEE (arXiv 2006.04152), in stages; 0 for background.
    """
    assert view.agreements is not None
    return (view.agreements * view.is_foreground).float()


def on_live(measure: Measure, view: RegionView) -> Tensor:
    """``[R]``: the measure of the live regions; 0 for the others where that saves time.

    On a CPU only the live regions are measured, unless there is hardly anything to compute. On a
    GPU, for which a thousand regions are little work, all are: their number is known.
    """
    if view.gone is None or measure in _CHEAP or view.boxes.device.type != "cpu":
        return measure(view)
    rows = view.live_rows()
    live = view[rows]
    live.gone = None
    values = measure(live)
    return values.new_zeros(len(view)).index_copy_(0, rows, values)


MEASURES: dict[str, Measure] = {
    "max_prob": max_prob,
    "entropy": entropy,
    "margin": margin,
    "agreement": agreement,
}
_CHEAP: tuple[Measure, ...] = (max_prob, agreement)


def refinement(view: RegionView) -> Tensor:
    """``[R]`` in [0, 1]: IoU of the box before and after the stage."""
    return view.refinement_ious


def predicted_iou(view: RegionView) -> Tensor:
    """``[R]`` in [0, 1]: IoU of the box with its object, predicted by the IoU head."""
    assert view.predicted_ious is not None
    return view.predicted_ious


LOCALISATIONS: dict[str, Measure] = {"refinement": refinement, "predicted_iou": predicted_iou}


@dataclass
class AcceptConfident:
    """Accepts regions that reach the thresholds of confidence and localisation.

    Args:
        confidence: of the class, such as one of ``MEASURES``.
        thresholds: S - 1 values of ``confidence``.
        localisation: of the box, such as one of ``LOCALISATIONS``; ``None`` for any box.
        localisation_thresholds: S - 1 values of ``localisation``.
    """

    confidence: Measure
    thresholds: Sequence[float]
    localisation: Measure | None = None
    localisation_thresholds: Sequence[float] = ()
    reason = "confident"

    def is_active(self, stage: int) -> bool:
        """After every stage; before stage 0 there are no classes."""
        return stage >= 0

    def exit_mask(self, view: RegionView) -> Tensor:
        """Bool ``[R]``."""
        ready = on_live(self.confidence, view) >= self.thresholds[view.stage]
        if self.localisation is None:
            return ready
        return ready & (self.localisation(view) >= self.localisation_thresholds[view.stage])
