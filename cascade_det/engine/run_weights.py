"""Loads or resumes the weights of a training or evaluation; checks them against the data."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from cascade_det import config
from cascade_det.data.coco import CocoDataset
from cascade_det.data.semantic import SemanticDataset, SemanticSource
from cascade_det.engine.checkpoint import Checkpointer
from cascade_det.engine.devices import device_name
from cascade_det.engine.output_dir import config_changes
from cascade_det.engine.run_info import usable_run_info
from cascade_det.errors import CheckpointError, DatasetError
from cascade_det.weights import load_weights, weights_sha256

logger = logging.getLogger(__name__)


def resume_or_load(checkpointer: Checkpointer, cfg: CfgNode, *, resume: bool) -> None:
    """Resume from the last checkpoint in ``OUTPUT_DIR``, or load ``MODEL.WEIGHTS``.

    Raises:
        CheckpointError: as the checkpointer, and naming the keys of ``MODEL`` that were changed.
    """
    try:
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    except CheckpointError as error:
        changed = config_changes(cfg, "MODEL.") if resume else []
        if not changed:
            raise
        raise CheckpointError(f"{error} Changed since: {', '.join(changed)}.") from error


def load_to_evaluate(
    checkpointer: Checkpointer,
    cfg: CfgNode,
    datasets: Sequence[CocoDataset | SemanticDataset],
    *,
    resume: bool,
) -> None:
    """Load the weights to evaluate, compare their classes with the data, and log the exits.

    Raises:
        CheckpointError: they cannot be read or do not fit, or there is nothing to resume.
        DatasetError: they were trained on other classes, where the checkpoint names them.
    """
    model = checkpointer.model
    if resume:
        run = checkpointer.resume_or_load("").get("run")
        path = Path(checkpointer.get_checkpoint_file())
        weights: Mapping[str, Tensor] = model.state_dict()
    else:
        file = load_weights(model, cfg.MODEL.WEIGHTS, complete=True).file
        run, path, weights = file.run, file.path, file.weights
    class_names = usable_run_info(run, path).get("class_names")
    for dataset in datasets:
        _check_trained_classes(class_names, dataset)
    log_exits(cfg, next(model.parameters()).device, path, weights)


def log_exits(
    cfg: CfgNode, device: torch.device, path: Path, weights: Mapping[str, Tensor]
) -> None:
    """Log the exits in use; warn if they were calibrated on another device or other weights.

    Args:
        cfg: of the detector.
        device: of the detector.
        path: the file of the weights.
        weights: as in the file.
    """
    logger.info("%s", config.exit_summary(cfg))
    exits = cfg.MODEL.CASCADE.EXIT
    if not exits.ENABLED:
        return
    wanted = exits.WEIGHTS_SHA256
    if wanted and (found := weights_sha256(weights)) != wanted:
        logger.warning(
            "MODEL.CASCADE.EXIT.WEIGHTS_SHA256 is %s..., but %s has other weights (%s...): the "
            "results of the calibration may not hold for these. Calibrate the exits on these "
            "weights (cascade-det calibrate).",
            wanted[:12],
            path,
            found[:12],
        )
    measured, here = exits.DEVICE_NAME, device_name(device)
    if measured not in ("", here):
        logger.warning(
            "MODEL.CASCADE.EXIT.DEVICE_NAME is %r, but this is %r: the thresholds of the exits "
            "depend on latencies that were measured there. Calibrate them on this device "
            "(cascade-det calibrate).",
            measured,
            here,
        )


def _check_trained_classes(
    class_names: Sequence[str] | None, dataset: CocoDataset | SemanticDataset
) -> None:
    if class_names is not None and tuple(class_names) != tuple(dataset.class_names):
        source = dataset.source
        file, order = (
            (source.folder, "label")
            if isinstance(source, SemanticSource)
            else (source.json_file, "category id")
        )
        raise DatasetError(
            f"{file} has the classes {', '.join(dataset.class_names)} (by {order}), but the "
            f"checkpoint was trained on {', '.join(class_names)}: evaluate on the classes that "
            "were trained, in the same order"
        )
