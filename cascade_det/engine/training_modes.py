"""What an engine does for the training regime of a cascade, wherever in a detector that is."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from cascade_det.core.training_schedule import TrainingSchedule
from cascade_det.errors import ConfigError


def progress_of(detector: nn.Module) -> float:
    """Share of the training that is done, as its regimes know it; 0 where there are none."""
    return next((regime.progress for regime in _regimes(detector)), 0.0)


def set_progress(detector: nn.Module, progress: float) -> None:
    """Tell the regimes which share of the training is done, in [0, 1]."""
    for regime in _regimes(detector):
        regime.progress = progress


def freeze_detector(detector: nn.Module) -> None:
    """Take all parameters but those of learned exits out of training, where a regime asks for it.

    Raises:
        ConfigError: there are no learned exits.
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
    """``detector.train()``; but what is frozen for the sake of exits is in evaluation mode.

    So norms keep their statistics, dropout is off, and proposals are those of inference. Only what
    holds the exits is in training, since that is what makes it compute losses.
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
    """Names of the modules whose regimes train exits alone, and these exits."""
    for name, module in detector.named_modules():
        regime = getattr(module, "regime", None)
        if isinstance(regime, TrainingSchedule) and regime.exits_alone:
            yield name, getattr(module, "exits", None)


def _regimes(detector: nn.Module) -> Iterator[TrainingSchedule]:
    return (module for module in detector.modules() if isinstance(module, TrainingSchedule))
