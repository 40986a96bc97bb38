"""An exponential moving average of the weights, which detects better than the last weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cascade_det.engine.hooks import Hook
from cascade_det.engine.loop import TrainingLoop

Tensors = tuple[Tensor, ...] | list[Tensor]


class WeightAverage(Hook):
    """Averages all parameters and buffers.

    At iteration *t* the average keeps ``min(decay, (1 + t) / (10 + t))`` of itself, so that it
    forgets the initial weights quickly.

    Args:
        detector: copied as it is now; the copy is updated after every step.
        decay: the share that is kept in the long run, in (0, 1).
    """

    def __init__(self, detector: nn.Module, decay: float) -> None:
        self._detector = detector
        self._average = AveragedModel(detector, multi_avg_fn=self._update, use_buffers=True)
        self._decay = decay

    @property
    def module(self) -> nn.Module:
        """The detector with averaged weights."""
        return self._average.module

    def after_step(self, trainer: TrainingLoop) -> None:
        """Update the average."""
        self._average.update_parameters(self._detector)

    def state_dict(self) -> dict[str, Any]:
        """The number of averaged steps; the average itself is the checkpoint's model."""
        return {"steps": int(self._average.n_averaged)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._average.n_averaged.fill_(state["steps"])

    def _update(self, averages: Tensors, current: Tensors, steps: Tensor | int) -> None:
        keep = min(self._decay, (1 + int(steps)) / (10 + int(steps)))
        get_ema_multi_avg_fn(keep)(averages, current, steps)
