"""Scaling a schedule to another number of processes or images."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fvcore.common.config import CfgNode

from cascade_det.config.tree import value_of
from cascade_det.errors import ConfigError

_NORMS = ("MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM")
_OWN_NORMS = "MODEL.CASCADE.BOX_HEAD.NORM"
# Of Detectron2's recipes.
_USUAL_IMAGES = 16


def scale_to_world_size(cfg: CfgNode, world_size: int) -> CfgNode:
    """Apply Detectron2's rule of ``SOLVER.REFERENCE_WORLD_SIZE``; 0 there scales nothing.

    With k = ``world_size / REFERENCE_WORLD_SIZE``, ``SOLVER.IMS_PER_BATCH`` and ``BASE_LR`` are
    multiplied by k; ``MAX_ITER``, ``WARMUP_ITERS``, ``STEPS``, ``CHECKPOINT_PERIOD`` and
    ``TEST.EVAL_PERIOD`` are divided by k, but never to 0. The images per process and iteration, and
    those of the whole training, stay the same. Scaling the result again changes nothing.

    Args:
        cfg: a checked configuration; it is not changed.
        world_size: processes that train together, on all machines, >= 1.

    Returns:
        A configuration for ``world_size`` processes, frozen if ``cfg`` is; check it again.

    Raises:
        ConfigError: the processes (times ``CASCADE.ACCUMULATION_STEPS``) do not divide the images
            of an iteration.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference not in (0, world_size):
        _check_share(cfg, reference, "SOLVER.REFERENCE_WORLD_SIZE")
        scale = world_size / reference
        cfg = _rescaled(
            cfg,
            scale,
            round,
            IMS_PER_BATCH=round(cfg.SOLVER.IMS_PER_BATCH * scale),
            BASE_LR=cfg.SOLVER.BASE_LR * scale,
            REFERENCE_WORLD_SIZE=world_size,
        )
    _check_share(cfg, world_size, "the number of processes (--num-gpus x --num-machines)")
    return cfg


def scale_to_batch(cfg: CfgNode, images: int) -> CfgNode:
    """Set ``SOLVER.IMS_PER_BATCH``, with a rate and a schedule that were given for 16 images.

    The linear scaling rule (arXiv 1706.02677, section 2.1): with k = ``images / 16``, ``BASE_LR``
    and ``BASE_LR_END`` are multiplied by k, and the lengths and periods in iterations divided.

    Args:
        cfg: a checked configuration; it is not changed.
        images: of an iteration, over all processes, >= 1.

    Returns:
        A configuration for this batch, frozen if ``cfg`` is.
    """
    scale = images / _USUAL_IMAGES
    solver = cfg.SOLVER
    return _rescaled(
        cfg,
        scale,
        round,
        IMS_PER_BATCH=images,
        BASE_LR=solver.BASE_LR * scale,
        BASE_LR_END=solver.BASE_LR_END * scale,
        # Steps that coincide become one: a list of steps has to increase.
        STEPS=tuple(sorted({_shorter(step, scale, round) for step in solver.STEPS})),
    )


def scale_to_epochs(cfg: CfgNode, images: int) -> CfgNode:
    """Apply ``CASCADE.EPOCHS``; 0 there scales nothing.

    ``SOLVER.MAX_ITER`` becomes the iterations of that many epochs, rounded up; ``WARMUP_ITERS``,
    ``STEPS``, ``CHECKPOINT_PERIOD`` and ``TEST.EVAL_PERIOD`` change in proportion, but never to 0.
    Scaling the result again changes nothing.

    Args:
        cfg: a checked configuration, scaled to its number of processes; it is not changed.
        images: in the training set, >= 1.

    Returns:
        A configuration with this schedule, frozen if ``cfg`` is.
    """
    if not cfg.CASCADE.EPOCHS:
        return cfg
    iterations = max(_up(cfg.CASCADE.EPOCHS * images / cfg.SOLVER.IMS_PER_BATCH), 1)
    if iterations == cfg.SOLVER.MAX_ITER:
        return cfg
    scale = cfg.SOLVER.MAX_ITER / iterations
    # Steps that coincide become one: a list of steps has to increase.
    steps = tuple(sorted({_shorter(step, scale, _up) for step in cfg.SOLVER.STEPS}))
    # Rounded up, ten periods never make an eleventh evaluation just before the end.
    return _rescaled(cfg, scale, _up, MAX_ITER=iterations, STEPS=steps)


def check_processes(cfg: CfgNode, world_size: int, *, train: bool) -> None:
    """Check that this many processes can train, or evaluate, a configuration.

    Raises:
        ConfigError: ``MODEL.DEVICE`` is one GPU for all processes, or SyncBN would train on CPUs.
    """
    if world_size == 1:
        return
    device = cfg.MODEL.DEVICE
    if device.startswith("cuda:"):
        raise ConfigError(
            f"MODEL.DEVICE is {device}, but there are {world_size} processes, and each needs a GPU "
            "of its own. Set it to cuda."
        )
    keys = synchronised_norms(cfg)
    if keys and train and device == "cpu":
        raise ConfigError(
            f"{' and '.join(keys)}: SyncBN cannot be trained by {world_size} processes on the CPU. "
            "Take GN or BN, or train with one process or on GPUs."
        )


def synchronised_norms(cfg: CfgNode) -> list[str]:
    """The keys that ask for SyncBN."""
    keys = [key for key in _NORMS if value_of(cfg, key) == "SyncBN"]
    return [*keys, _OWN_NORMS] if "SyncBN" in value_of(cfg, _OWN_NORMS) else keys


def _up(value: float) -> int:
    """Round up, but not 3.0000001, which floats make of 0.1 * 30."""
    return math.ceil(round(value, 6))


def _rescaled(cfg: CfgNode, scale: float, whole: Callable[[float], int], **solver: Any) -> CfgNode:
    """A copy with lengths and periods in iterations divided by ``scale``, and values of SOLVER."""
    copy = cfg.clone()
    copy.defrost()
    for key in ("MAX_ITER", "WARMUP_ITERS", "CHECKPOINT_PERIOD"):
        copy.SOLVER[key] = _shorter(copy.SOLVER[key], scale, whole)
    copy.SOLVER.STEPS = tuple(_shorter(step, scale, whole) for step in copy.SOLVER.STEPS)
    copy.SOLVER.update(solver)
    copy.TEST.EVAL_PERIOD = _shorter(copy.TEST.EVAL_PERIOD, scale, whole)
    if cfg.is_frozen():
        copy.freeze()
    return copy


def _shorter(iterations: int, scale: float, whole: Callable[[float], int]) -> int:
    # 0 means "never" or "none": it stays, and nothing else becomes 0.
    return max(whole(iterations / scale), 1) if iterations else 0


def _check_share(cfg: CfgNode, processes: int, name: str) -> None:
    images, parts = cfg.SOLVER.IMS_PER_BATCH, cfg.CASCADE.ACCUMULATION_STEPS
    shares = processes * parts
    if images % shares == 0:
        return
    times = f" times CASCADE.ACCUMULATION_STEPS, {parts}" if parts > 1 else ""
    below, above = images // shares * shares, -(-images // shares) * shares
    remedy = f"{below} or {above}" if below else f"{above}"
    raise ConfigError(
        f"SOLVER.IMS_PER_BATCH is {images}, which is not a multiple of {name}, {processes}{times}. "
        f"Give a multiple of {shares}, such as {remedy}."
    )
