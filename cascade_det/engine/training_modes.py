"""Applies a cascade's training schedule to the whole detector: progress, freezing, modes."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from cascade_det.core.training_schedule import TrainingSchedule
from cascade_det.errors import ConfigError


def progress_of(detector: nn.Module) -> float:
    """Share of the training that is done, in [0, 1]; 0 without a training schedule."""
    return next((schedule.progress for schedule in _schedules(detector)), 0.0)


def set_progress(detector: nn.Module, progress: float) -> None:
    """Set the share of the training that is done, in [0, 1], in every training schedule."""
    for schedule in _schedules(detector):
        schedule.progress = progress


def freeze_detector(detector: nn.Module) -> None:
    """Freeze all parameters but those of learned exits, if the training schedule asks for it.

    Raises:
        ConfigError: it does, and there are no learned exits.
    """
    owners = list(_exits_alone(detector))
    if not owners:
        return
    exits = {id(p) for _, part in owners if part is not None for p in part.parameters()}
    if not exits:
        raise ConfigError(
            "MODEL.CASCADE.TRAINING.FREEZE_DETECTOR is True, but the model has no learned exits "
            "that could be trained. Name some in MODEL.CASCADE.EXIT.LEARNED, or set it to False."
        )
    for parameter in detector.parameters():
        if id(parameter) not in exits:
            parameter.requires_grad_(False)


def training_mode(detector: nn.Module) -> None:
    """``detector.train()``, except that a detector frozen for its exits is in evaluation mode.

    There norms keep their statistics, dropout is off, and proposals are those of inference. Only
    the modules that contain the exits are in training mode, since that makes them compute losses.
    """
    detector.train()
    owners = list(_exits_alone(detector))
    if not owners:
        return
    detector.eval()
    for name, exits in owners:
        parts = name.split(".") if name else []
        for depth in range(len(parts) + 1):
            detector.get_submodule(".".join(parts[:depth])).training = True
        if exits is not None:
            exits.train()


def _exits_alone(detector: nn.Module) -> Iterator[tuple[str, nn.Module | None]]:
    """Names of the modules whose schedule trains exits alone, and these exits."""
    for name, module in detector.named_modules():
        schedule = getattr(module, "regime", None)
        if isinstance(schedule, TrainingSchedule) and schedule.exits_alone:
            yield name, getattr(module, "exits", None)


def _schedules(detector: nn.Module) -> Iterator[TrainingSchedule]:
    return (module for module in detector.modules() if isinstance(module, TrainingSchedule))
