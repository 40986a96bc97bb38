"""Finds where a training step diverged first."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

# A metric with such a name counts boxes that are NaN or Inf.
NONFINITE_BOXES = "nonfinite_boxes"
# The factor of the loss in float16, which halves with every step whose gradients overflow.
LOSS_SCALE = "amp/scale"
_SMALLEST_SCALE = 1e-4


def divergence(metrics: Mapping[str, float]) -> str | None:
    """The first place in the computation where a step diverged, and all losses.

    Args:
        metrics: losses, ``gradient_norm``, and metrics; a metric may be NaN, which means no value,
            unless its name ends in ``NONFINITE_BOXES``.

    Returns:
        Text for a message; ``None`` if all is finite.
    """
    losses = {n: v for n, v in metrics.items() if "loss" in n or n == "gradient_norm"}
    where = _place_of_divergence(metrics, losses)
    values = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    return where and f"{where} (losses: {values})"


def _place_of_divergence(metrics: Mapping[str, float], losses: Mapping[str, float]) -> str | None:
    boxes = [n for n, v in metrics.items() if n.endswith(NONFINITE_BOXES) and v != 0]
    wrong = [name for name, value in losses.items() if not math.isfinite(value)]
    if boxes or wrong:
        # In the order of the computation: the RPN, then stage by stage; sums come last.
        first = min([*boxes, *wrong], key=_order)
        stage = re.search(r"stage(\d+)", first)
        place = f"stage {stage[1]} of the cascade" if stage else _place_of(first)
        what = "boxes are NaN or Inf" if first in boxes else f"{first} is {losses[first]:.4g}"
        return f"in {place}, {what}"
    if metrics.get(LOSS_SCALE, 1.0) < _SMALLEST_SCALE:
        scale = f"{LOSS_SCALE} {metrics[LOSS_SCALE]:.4g}"
        return f"in the backward pass, gradients overflow however small the loss is scaled, {scale}"
    return None


def _order(name: str) -> tuple[int, int]:
    # These are computed from the losses of the stages.
    if name in ("loss_prefix", "loss_stage_weights", "total_loss", "gradient_norm"):
        return (2, 0)
    stage = re.search(r"stage(\d+)", name)
    return (1, int(stage[1])) if stage else (0, 0)


def _place_of(name: str) -> str:
    if name == "gradient_norm":
        return "the backward pass"
    return "the RPN" if "rpn" in name else "the detector"
