"""``SOLVER.IMS_PER_BATCH`` 0: the largest batch that fits into the memory of the GPUs."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.engine.devices import resolve_device
from cascade_det.engine.output_dir import CONFIG_FILE
from cascade_det.engine.step import TrainingStep
from cascade_det.errors import ConfigError
from cascade_det.parallel import distributed

logger = logging.getLogger(__name__)

# A step on a model of its own, and batches to take images from.
Trial = Callable[[CfgNode], tuple[TrainingStep, Iterable[Sequence[Any]]]]

_MOST = 64  # images of a process
_LOOKED_AT = 32


def with_batch_size(cfg: CfgNode, trial: Trial, *, resume: bool) -> CfgNode:
    """Replace ``SOLVER.IMS_PER_BATCH`` 0 by the largest batch that fits.

    The candidates are 64 images of a process, 32, ..., 1. Each runs two whole steps, with a
    learning rate of 0, on the image with the most pixels and the one with the most objects of 32.
    The processes try at once, each on its GPU, and the smallest result holds. A resumed run keeps
    its batch size. See :func:`cascade_det.config.scale_to_batch` for rate and schedule.

    Args:
        cfg: a checked configuration.
        trial: builds a step for a configuration; called before the run sets its seed.
        resume: whether the run in ``OUTPUT_DIR`` goes on.

    Returns:
        ``cfg`` itself if it has a batch size.

    Raises:
        ConfigError: there is no GPU, a single image does not fit, or SyncBN or
            ``SOLVER.REFERENCE_WORLD_SIZE`` would need the size before.
    """
    if cfg.SOLVER.IMS_PER_BATCH:
        return cfg
    _check(cfg)
    if resume:
        images = config.load_config(Path(cfg.OUTPUT_DIR) / CONFIG_FILE).SOLVER.IMS_PER_BATCH
        origin = "that of the run"
    else:
        images = _largest_batch(cfg, trial)
        origin = "the largest that fits"
    scaled = config.scale_to_batch(cfg, images)
    changes = config.changed_keys(cfg, scaled).items()
    logger.info(
        "SOLVER.IMS_PER_BATCH is 0, the batch is %s: %s",
        origin,
        ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changes),
    )
    return config.scale_to_world_size(scaled, distributed.world_size())


def _check(cfg: CfgNode) -> None:
    problem = ""
    if resolve_device(cfg).type != "cuda":
        problem = "is for GPUs, and this run is on the CPU"
    elif distributed.world_size() > 1 and (keys := config.synchronised_norms(cfg)):
        problem = f"tries each GPU by itself, which SyncBN ({', '.join(keys)}) cannot"
    if problem:
        raise ConfigError(f"SOLVER.IMS_PER_BATCH is 0: that {problem}. Give the number of images.")


def _largest_batch(cfg: CfgNode, trial: Trial) -> int:
    """The images of an iteration, over all processes."""
    parts = cfg.CASCADE.ACCUMULATION_STEPS
    shares = distributed.world_size() * parts
    small = config.changed(
        cfg, "SOLVER.IMS_PER_BATCH", shares, "DATALOADER.NUM_WORKERS", 0, "SEED", 0
    )
    size = _MOST
    with distributed.alone():
        step, batches = trial(small)
        for group in step.optimizer.param_groups:
            group["lr"] = 0.0
        images = _heaviest(itertools.islice(itertools.chain.from_iterable(batches), _LOOKED_AT))
        while size and not _fits(step, (images * size * parts)[: size * parts]):
            logger.info("%d images do not fit into the memory of this GPU", size)
            size //= 2
    del step
    torch.cuda.empty_cache()
    size = min(distributed.all_gather(size))
    if not size:
        raise ConfigError(
            "SOLVER.IMS_PER_BATCH is 0, but not even one image fits into the memory of the GPU: "
            "lower INPUT.MIN_SIZE_TRAIN, or set SOLVER.AMP.ENABLED True"
        )
    return size * shares


def _fits(step: TrainingStep, batch: list[Any]) -> bool:
    try:
        # The optimiser allocates its state at the end of the first step.
        for iteration in range(2):
            step.run(batch, iteration)
    except torch.OutOfMemoryError:
        fits = False
    else:
        fits = True
    # Only here, where no traceback holds tensors any more.
    step.optimizer.zero_grad()
    torch.cuda.empty_cache()
    return fits


def _heaviest(samples: Iterable[Any]) -> list[Any]:
    """The sample with the most pixels, and the one with the most objects."""
    found = list(samples)

    def pixels(sample: Any) -> int:
        return int(sample["image"].shape[-2] * sample["image"].shape[-1])

    def objects(sample: Any) -> int:
        return len(sample.get("gt_classes", sample.get("instances", ())))

    return [max(found, key=pixels), max(found, key=objects)]
