"""State of a training besides its weights, as plain types for a checkpoint.

State comes from the checkpoint, settings from the configuration: a run resumed with another
learning rate or weight decay uses the new one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from cascade_det.errors import CheckpointError
from cascade_det.parallel import distributed
from cascade_det.text import listed

logger = logging.getLogger(__name__)


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """The optimiser's state of each parameter, by the parameter's name.

    Unlike the indices that PyTorch stores, names survive a change of the parameter groups.
    """
    names: dict[Any, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        "type": type(optimizer).__name__,
        "state": {names[parameter]: dict(state) for parameter, state in optimizer.state.items()},
    }


def load_optimizer_state(optimizer: Optimizer, model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Restore :func:`optimizer_state`.

    Raises:
        CheckpointError: it is of another kind of optimiser, or of other parameters.
    """
    kind = type(optimizer).__name__
    if saved["type"] != kind:
        raise CheckpointError(
            f"the optimiser in the checkpoint is {saved['type']}, CASCADE.OPTIMIZER asks for {kind}"
        )
    names = {parameter: name for name, parameter in model.named_parameters()}
    trained = [names[p] for group in optimizer.param_groups for p in group["params"]]
    only_saved, only_here = set(saved["state"]) - set(trained), set(trained) - set(saved["state"])
    # An optimiser that never stepped has no state at all.
    if saved["state"] and (only_saved or only_here):
        theirs, ours = (listed(sorted(names), 3) or "nothing" for names in (only_saved, only_here))
        raise CheckpointError(
            f"the checkpoint trained {theirs} that this run does not, and this run "
            f"trains {ours} that the checkpoint did not; look at "
            "MODEL.BACKBONE.FREEZE_AT and MODEL.CASCADE.TRAINING.FREEZE_DETECTOR"
        )
    shapes = {name: parameter.shape for parameter, name in names.items()}
    for name, entries in saved["state"].items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor) and value.shape not in ((), shapes[name]):
                raise CheckpointError(
                    f"the optimiser's {key} of {name} is {tuple(value.shape)} in the checkpoint, "
                    f"the parameter is {tuple(shapes[name])}"
                )
    state = {i: saved["state"][name] for i, name in enumerate(trained) if name in saved["state"]}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def load_scheduler_state(scheduler: LambdaLR, saved: Mapping[str, Any]) -> None:
    """Move to the iteration of a scheduler's ``state_dict``, keeping this one's rates."""
    position = {key: saved[key] for key in ("last_epoch", "_step_count")}
    scheduler.load_state_dict({**scheduler.state_dict(), **position})
    rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    for group, (base, factor) in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def random_state() -> dict[str, Any]:
    """The state of PyTorch's generators in this process: ``cpu``, and ``cuda`` where it is used."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore :func:`random_state`."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def own_random_state(of_all: list[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The state of this process among those of all; ``None`` if their number has changed."""
    if len(of_all) == distributed.world_size():
        return of_all[distributed.rank()]
    logger.warning(
        "Written by %d processes, resumed by %d: their random numbers start over",
        len(of_all),
        distributed.world_size(),
    )
    return None
