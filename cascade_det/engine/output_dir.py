"""The output folder of a run: free to use, with its configuration, cleaned up."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.config.yaml_files import read_entries, read_text
from cascade_det.engine.checkpoint import checkpoint_to_resume
from cascade_det.engine.hooks import START
from cascade_det.engine.loggers import RUNS_FILE, check_installed
from cascade_det.engine.restarts import record_job
from cascade_det.errors import ConfigError
from cascade_det.files import atomic_path, remove_leftovers
from cascade_det.parallel import distributed

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
_OF_EVALUATIONS = ("inference", "analysis", "analysis/worst_images")
# Detectron2's recipes: SGD with this rate for this many images.
_USUAL_LR, _USUAL_IMAGES = 0.02, 16


def check_output(cfg: CfgNode, *, resume: bool) -> None:
    """Check, before any work, that ``OUTPUT_DIR`` has a run to resume, or none to overwrite.

    Raises:
        CheckpointError: there is nothing to resume.
        ConfigError: a package of ``CASCADE.LOGGERS`` is missing.
        ConfigError: it holds a run that is not resumed, or a ``config.yaml`` that no run wrote.
    """
    check_installed(cfg.CASCADE.LOGGERS)
    if resume:
        checkpoint_to_resume(cfg.OUTPUT_DIR)
        return
    files = sorted(Path(cfg.OUTPUT_DIR).glob("model_*.pth"))
    trained = [file for file in files if file.stem != START]
    if trained:
        raise ConfigError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR} holds the run of an earlier training "
            f"({trained[-1].name}), which this one would overwrite. Add --resume to continue it, "
            "or give another OUTPUT_DIR, or remove it."
        )
    file = Path(cfg.OUTPUT_DIR) / CONFIG_FILE
    if os.path.lexists(file) and not _is_of_a_run(file, cfg):
        raise ConfigError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR} holds a {CONFIG_FILE} that no run wrote, and this one "
            "would overwrite it with all values of its configuration. Give another OUTPUT_DIR, or "
            "that file another name."
        )


def _is_of_a_run(file: Path, cfg: CfgNode) -> bool:
    """Whether a configuration has a value for each key, as no handwritten one has."""
    if not file.is_file():
        return False
    try:
        entries = read_entries(read_text(file), file)
    except ConfigError:
        return False
    return config.flat(cfg).keys() <= {entry.key for entry in entries}


def config_changes(cfg: CfgNode, within: str = "") -> list[str]:
    """The keys below ``within`` whose values differ from ``OUTPUT_DIR/config.yaml``."""
    file = Path(cfg.OUTPUT_DIR) / CONFIG_FILE
    if not file.is_file():
        return []
    changed = config.changed_keys(config.load_config(file), cfg)
    return [f"{k} {old!r} -> {new!r}" for k, (old, new) in changed.items() if k.startswith(within)]


def record_start(cfg: CfgNode, *, resume: bool) -> None:
    """Write ``config.yaml``, remove leftovers of a killed run, and log how this one trains."""
    if distributed.is_main():
        for folder in _written_to(cfg):
            remove_leftovers(folder)
        if not resume:
            # Loggers start new runs.
            Path(cfg.OUTPUT_DIR, RUNS_FILE).unlink(missing_ok=True)
        for change in config_changes(cfg) if resume else ():
            logger.info("Resumed with another %s", change)
        with atomic_path(Path(cfg.OUTPUT_DIR) / CONFIG_FILE) as temporary:
            temporary.write_text(cfg.dump())
        record_job(cfg.OUTPUT_DIR)
    _log_learning_rate(cfg)
    logger.info("%s", config.exit_summary(cfg))
    if not cfg.MODEL.WEIGHTS and not resume:
        _warn_of_frozen_noise(cfg)


def _written_to(cfg: CfgNode) -> Iterator[Path]:
    """The folders that a run writes into: its own, and those of an evaluation on each test set."""
    output = Path(cfg.OUTPUT_DIR)
    for folder in (output, *(output / name for name in cfg.DATASETS.TEST)):
        yield folder
        yield from (folder / below for below in _OF_EVALUATIONS)


def _log_learning_rate(cfg: CfgNode) -> None:
    """Log the rate and the images per step, and the rate by the linear scaling rule.

    arXiv 1706.02677, section 2.1: the rate of SGD grows in proportion to the images of a step.
    """
    solver, processes = cfg.SOLVER, distributed.world_size()
    parts = cfg.CASCADE.ACCUMULATION_STEPS
    logger.info(
        "%s, learning rate %g for %d images per iteration: %d process(es) x %d part(s) x %d images",
        cfg.CASCADE.OPTIMIZER,
        solver.BASE_LR,
        solver.IMS_PER_BATCH,
        processes,
        parts,
        solver.IMS_PER_BATCH // processes // parts,
    )
    usual = _USUAL_LR * solver.IMS_PER_BATCH / _USUAL_IMAGES
    if cfg.CASCADE.OPTIMIZER == "SGD" and not usual / 2 <= solver.BASE_LR <= usual * 2:
        logger.info(
            "Detectron2's recipes have %g for %d images; by the linear scaling rule that is "
            "SOLVER.BASE_LR %g for these %d",
            _USUAL_LR,
            _USUAL_IMAGES,
            usual,
            solver.IMS_PER_BATCH,
        )


def _warn_of_frozen_noise(cfg: CfgNode) -> None:
    """Warn of frozen parts with random weights: only the AP would show them."""
    backbone, norm = cfg.MODEL.BACKBONE, cfg.MODEL.RESNETS.NORM
    frozen = [f"MODEL.BACKBONE.FREEZE_AT is {backbone.FREEZE_AT}"] if backbone.FREEZE_AT else []
    if backbone.NAME == "build_efficientvit_fpn_backbone":
        if cfg.MODEL.EFFICIENTVIT.NORM_EVAL:
            frozen.append("MODEL.EFFICIENTVIT.NORM_EVAL is True")
    elif ("resnet" in backbone.NAME or "mobilenet" in backbone.NAME) and norm == "FrozenBN":
        frozen.append("MODEL.RESNETS.NORM is FrozenBN")
    if frozen:
        logger.warning(
            "MODEL.WEIGHTS is empty, but %s: give a file of weights, or train these parts "
            "(MODEL.BACKBONE.FREEZE_AT 0, MODEL.RESNETS.NORM BN or GN, "
            "MODEL.EFFICIENTVIT.NORM_EVAL False)",
            " and ".join(frozen),
        )
