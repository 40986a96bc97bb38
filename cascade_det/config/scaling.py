"""A schedule made for one number of processes or images, on another number of them."""

from __future__ import annotations

import math
from collections.abc import Callable

from fvcore.common.config import CfgNode

from cascade_det.config.tree import value_of
from cascade_det.errors import ConfigError

_NORMS = ("MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM")
_OWN_NORMS = "MODEL.CASCADE.BOX_HEAD.NORM"


def scale_to_world_size(cfg: CfgNode, world_size: int) -> CfgNode:
    """Detectron2's rule of ``SOLVER.REFERENCE_WORLD_SIZE``; 0 there leaves everything as it is.

    With ``world_size / REFERENCE_WORLD_SIZE`` times as many processes, ``SOLVER.IMS_PER_BATCH``
    and ``BASE_LR`` are as many times as large, and what is counted in iterations is as many times
    shorter, though never 0: ``MAX_ITER``, ``WARMUP_ITERS``, ``STEPS``, ``CHECKPOINT_PERIOD`` and
    ``TEST.EVAL_PERIOD``. A process has as many images in each iteration, and the whole training as
    many in all. Called again with the result, this changes nothing.

    Args:
        cfg: a checked configuration; it is not changed.
        world_size: processes that train together, on all machines, >= 1.

    Returns:
        A configuration for ``world_size`` processes, frozen if ``cfg`` is; check it again.

    Raises:
        ConfigError: the images of an iteration cannot be shared evenly among the processes (and
            the parts of ``CASCADE.ACCUMULATION_STEPS``).
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference not in (0, world_size):
        _check_share(cfg, reference, "SOLVER.REFERENCE_WORLD_SIZE")
        cfg = _scaled(cfg, world_size)
    _check_share(cfg, world_size, "the number of processes (--num-gpus x --num-machines)")
    return cfg


def scale_to_epochs(cfg: CfgNode, images: int) -> CfgNode:
    """The rule of ``CASCADE.EPOCHS``; 0 there leaves everything as it is.

    ``SOLVER.MAX_ITER`` becomes the iterations that this many passes take, rounded up, and what is
    counted in iterations changes in proportion, though never to 0: ``WARMUP_ITERS``, ``STEPS``,
    ``CHECKPOINT_PERIOD`` and ``TEST.EVAL_PERIOD``. Called again with the result, this changes
    nothing.

    Args:
        cfg: a checked configuration, scaled to its number of processes; it is not changed.
        images: that are trained on, >= 1.

    Returns:
        A configuration with this schedule, frozen if ``cfg`` is.
    """
    if not cfg.CASCADE.EPOCHS:
        return cfg
    iterations = max(_up(cfg.CASCADE.EPOCHS * images / cfg.SOLVER.IMS_PER_BATCH), 1)
    if iterations == cfg.SOLVER.MAX_ITER:
        return cfg
    cfg, frozen = cfg.clone(), cfg.is_frozen()
    cfg.defrost()
    # Rounded up, ten periods never make an eleventh evaluation just before the end.
    _shorten(cfg, cfg.SOLVER.MAX_ITER / iterations, _up)
    cfg.SOLVER.MAX_ITER = iterations  # whatever floats made of it
    # Where two steps came to be one, the rate falls once: a list of steps has to increase.
    cfg.SOLVER.STEPS = tuple(sorted(set(cfg.SOLVER.STEPS)))
    if frozen:
        cfg.freeze()
    return cfg


def check_processes(cfg: CfgNode, world_size: int, *, train: bool) -> None:
    """Check that this many processes can train, or evaluate, what is configured.

    Raises:
        ConfigError: one GPU is named for all processes, or batch normalisation would have to be
            synchronised between processes on CPUs.
    """
    if world_size == 1:
        return
    device = cfg.MODEL.DEVICE
    if device.startswith("cuda:"):
        raise ConfigError(
            f"MODEL.DEVICE is {device}, but there are {world_size} processes, and each needs a GPU "
            "of its own. Set it to cuda."
        )
    keys = [key for key in _NORMS if value_of(cfg, key) == "SyncBN"]
    keys += [_OWN_NORMS] if "SyncBN" in value_of(cfg, _OWN_NORMS) else []
    if keys and train and device == "cpu":
        raise ConfigError(
            f"{' and '.join(keys)}: SyncBN cannot be trained by {world_size} processes on the CPU. "
            "Take GN or BN, or train with one process or on GPUs."
        )


def _scaled(cfg: CfgNode, world_size: int) -> CfgNode:
    cfg, frozen = cfg.clone(), cfg.is_frozen()
    cfg.defrost()
    solver = cfg.SOLVER
    scale = world_size / solver.REFERENCE_WORLD_SIZE
    solver.IMS_PER_BATCH = round(solver.IMS_PER_BATCH * scale)
    solver.BASE_LR *= scale
    _shorten(cfg, scale, round)
    solver.REFERENCE_WORLD_SIZE = world_size
    if frozen:
        cfg.freeze()
    return cfg


def _up(value: float) -> int:
    """The next whole number; not of 3.0000001, as floats make it of 0.1 * 30."""
    return math.ceil(round(value, 6))


def _shorten(cfg: CfgNode, scale: float, whole: Callable[[float], int]) -> None:
    """Divide what is counted in iterations, and make whole numbers of it."""

    def shorter(iterations: int) -> int:
        # 0 stands for "never" or "none" and stays; what is there does not become that.
        return max(whole(iterations / scale), 1) if iterations else 0

    solver = cfg.SOLVER
    for key in ("MAX_ITER", "WARMUP_ITERS", "CHECKPOINT_PERIOD"):
        solver[key] = shorter(solver[key])
    solver.STEPS = tuple(shorter(step) for step in solver.STEPS)
    cfg.TEST.EVAL_PERIOD = shorter(cfg.TEST.EVAL_PERIOD)


def _check_share(cfg: CfgNode, processes: int, name: str) -> None:
    images, parts = cfg.SOLVER.IMS_PER_BATCH, cfg.CASCADE.ACCUMULATION_STEPS
    shares = processes * parts
    if images % shares == 0:
        return
    times = f" times CASCADE.ACCUMULATION_STEPS, {parts}" if parts > 1 else ""
    below, above = images // shares * shares, -(-images // shares) * shares
    remedy = f"{below} or {above}" if below else f"{above}"
    raise ConfigError(
        f"SOLVER.IMS_PER_BATCH is {images}, which is no multiple of {name}, {processes}{times}. "
        f"Give a multiple of {shares}, such as {remedy}."
    )
