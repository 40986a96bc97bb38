"""What the heads put into Detectron2's event storage."""

from __future__ import annotations

import torch
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor

from cascade_det.core import CascadeStats


def log_metrics(metrics: dict[str, Tensor]) -> None:
    """Log the scalars of a training pass that are not NaN."""
    values = torch.stack([value.float() for value in metrics.values()]).tolist()
    # NaN: a stage without foreground has no mean over it.
    known = {name: value for name, value in zip(metrics, values, strict=True) if value == value}
    get_event_storage().put_scalars(**known)


def log_exit_rates(stats: CascadeStats) -> None:
    """Log exit rates, for evaluations during training.

    They are the share of regions that leave after each stage, and of tiles that are not computed.
    """
    if not has_event_storage():
        return
    if stats.tiles:
        get_event_storage().put_scalar("tiles/exit_rate", 1 - stats.tiles_computed / stats.tiles)
    for stage, (entered, left) in enumerate(zip(stats.entered, stats.left, strict=True)):
        if entered and stage < len(stats.entered) - 1:
            rate = sum(left.values()) / entered
            get_event_storage().put_scalar(f"stage{stage}/exit_rate", rate)
