"""What a run knows of itself beside its weights."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.config.key import shown
from cascade_det.config.yaml_files import read_entries, read_text
from cascade_det.data.coco import CocoDataset
from cascade_det.engine.checkpoint import Checkpointer, checkpoint_to_resume
from cascade_det.engine.devices import device_name
from cascade_det.engine.hooks import START
from cascade_det.errors import CheckpointError, ConfigError, DatasetError
from cascade_det.files import atomic_path, remove_leftovers
from cascade_det.parallel import distributed
from cascade_det.text import check_name
from cascade_det.weights.addresses import local_path
from cascade_det.weights.digest import weights_sha256
from cascade_det.weights.files import load_torch_file

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
_OF_EVALUATIONS = ("inference", "analysis", "analysis/worst_images")
_CLASSES = ("class_names", "category_ids")
_MOST_CLASSES = 100_000
# Detectron2's recipes: this rate for this many images (and SGD).
_USUAL_LR, _USUAL_IMAGES = 0.02, 16


@dataclass
class RunInfo:
    """What a checkpoint says beyond weights: enough to resume, and to name what it detects.

    Attributes:
        seed: of the data order and of everything random; below 0 draws one.
        class_names: K names.
        category_ids: K ids that the training data set gives these classes.
        host: which of the hosts trains, "standalone" or "detectron2".
    """

    seed: int
    class_names: list[str]
    category_ids: list[int]
    host: str

    def __post_init__(self) -> None:
        if self.seed < 0:
            self.seed = distributed.broadcast(secrets.randbelow(2**31))
            logger.info("SEED is negative: drew %d", self.seed)

    @classmethod
    def of(cls, cfg: CfgNode, dataset: CocoDataset, host: str) -> RunInfo:
        """That of a configuration on the classes of a data set."""
        return cls(cfg.SEED, list(dataset.class_names), list(dataset.category_ids), host)

    def state_dict(self) -> dict[str, Any]:
        """Plain types, for a checkpoint."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the seed of the resumed run.

        Raises:
            CheckpointError: it ran in another host, or its classes are not those of the data.
        """
        if (host := state.get("host", "standalone")) != self.host:
            raise CheckpointError(
                f"the run was trained by --host {host}, and cannot be resumed by --host "
                f"{self.host}; its weights can be taken as MODEL.WEIGHTS in either"
            )
        _check_classes(state)
        if list(state["class_names"]) != self.class_names:
            raise CheckpointError(
                f"the checkpoint has the classes {', '.join(state['class_names'])}; the data have "
                f"{', '.join(self.class_names)}"
            )
        seed = state["seed"]
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise CheckpointError(f"its seed is {shown(seed)}, not a whole number from 0 on")
        self.seed = seed


def run_of(file: Path) -> dict[str, Any]:
    """What our own checkpoints say of their run; nothing for weights from elsewhere.

    Either both the names and the ids of the classes are there, and safe to show, or neither. Where
    they cannot be used, the log says so: the weights are as good without them.
    """
    if file.suffix not in (".pth", ".pt"):
        return {}
    content = load_torch_file(file)
    return _usable(content.get("run", {}) if isinstance(content, dict) else {}, file)


def _usable(run: Any, file: str | Path) -> dict[str, Any]:
    if not isinstance(run, dict):
        logger.warning("%s: its entry 'run' is ignored, since it is not a dict", file)
        return {}
    try:
        if run.keys() & _CLASSES:
            _check_classes(run)
    except CheckpointError as error:
        logger.warning("%s: its class names are ignored: %s", file, error)
        return {name: value for name, value in run.items() if name not in _CLASSES}
    return run


def _check_classes(run: Mapping[str, Any]) -> None:
    """Make sure that a checkpoint names classes, and gives each an id of its own.

    Raises:
        CheckpointError: it does not.
    """
    names, ids = (_listed(run, key) for key in _CLASSES)
    for number, name in enumerate(names):
        try:
            check_name(name)
        except ValueError as error:
            raise CheckpointError(f"class_names, number {number}: {error}") from error
    wrong = [i for i in ids if type(i) is not int or not -(2**63) <= i < 2**63]
    if wrong:
        raise CheckpointError(f"category_ids has {shown(wrong[0])}, which is not a whole number")
    if len(ids) != len(names) or len(set(ids)) != len(ids):
        raise CheckpointError(
            f"category_ids has {len(set(ids))} different ids for {len(names)} classes"
        )


def _listed(run: Mapping[str, Any], key: str) -> list[Any]:
    values = run.get(key)
    if not isinstance(values, (list, tuple)) or len(values) > _MOST_CLASSES:
        raise CheckpointError(f"{key} is {shown(values)}, not a list of one value per class")
    return list(values)


def check_output(cfg: CfgNode, *, resume: bool) -> None:
    """Make sure, before any work, that ``OUTPUT_DIR`` has a run to resume, or none to overwrite.

    Raises:
        CheckpointError: there is nothing to resume.
        ConfigError: a run lies there that is not resumed, or a ``config.yaml`` that no run wrote.
    """
    if resume:
        checkpoint_to_resume(cfg.OUTPUT_DIR)
        return
    files = sorted(Path(cfg.OUTPUT_DIR).glob("model_*.pth"))
    trained = [file for file in files if file.stem != START]
    if trained:
        raise ConfigError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR} holds the run of an earlier training "
            f"({trained[-1].name}), which this one would overwrite. Add --resume to go on with it, "
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
    """Whether a configuration has a value for each key, as no one writes it by hand."""
    if not file.is_file():
        return False
    try:
        entries = read_entries(read_text(file), file)
    except ConfigError:
        return False
    return config.flat(cfg).keys() <= {entry.key for entry in entries}


def resume_or_load(checkpointer: Checkpointer, cfg: CfgNode, *, resume: bool) -> None:
    """Go on from the last checkpoint in ``OUTPUT_DIR``, or load ``MODEL.WEIGHTS``.

    Raises:
        CheckpointError: as the checkpointer, and naming the keys of ``MODEL`` that were changed.
    """
    try:
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    except CheckpointError as error:
        changed = changes(cfg, "MODEL.") if resume else []
        if not changed:
            raise
        raise CheckpointError(f"{error} Changed since: {', '.join(changed)}.") from error


def load_to_evaluate(
    checkpointer: Checkpointer, cfg: CfgNode, datasets: Sequence[CocoDataset], *, resume: bool
) -> None:
    """Load the weights to evaluate, which have to know the classes of the data; log the exits.

    Raises:
        CheckpointError: they cannot be read or do not fit, or there is nothing to resume.
        DatasetError: they were trained on other classes, where the checkpoint names them.
    """
    rest = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume, complete=True)
    file = Path(checkpoint_to_resume(cfg.OUTPUT_DIR) if resume else local_path(cfg.MODEL.WEIGHTS))
    run = _usable(rest.get("run", {}), file) if resume else run_of(file)
    for dataset in datasets:
        _check_trained_classes(run.get("class_names"), dataset)
    log_exits(cfg, next(checkpointer.model.parameters()).device, file)


def log_exits(cfg: CfgNode, device: torch.device, weights: str | Path) -> None:
    """Say which exits are used; warn where they were found on another device or other weights.

    Args:
        cfg: of the detector.
        device: where it is.
        weights: the local file that they were loaded from.
    """
    logger.info("%s", config.exit_summary(cfg))
    exits = cfg.MODEL.CASCADE.EXIT
    if not exits.ENABLED:
        return
    if exits.WEIGHTS_SHA256 and (found := weights_sha256(weights)) != exits.WEIGHTS_SHA256:
        logger.warning(
            "MODEL.CASCADE.EXIT.WEIGHTS_SHA256 is %s..., but %s has other weights (%s...): what "
            "calibration found out about the exits is not known to hold for these. Calibrate them "
            "on these weights (tools/calibrate_exits.py).",
            *(exits.WEIGHTS_SHA256[:12], weights, found[:12]),
        )
    measured, here = exits.DEVICE_NAME, device_name(device)
    if measured not in ("", here):
        logger.warning(
            "MODEL.CASCADE.EXIT.DEVICE_NAME is %r, but this is %r: the thresholds of the exits "
            "depend on latencies that were measured there. Calibrate them on this device "
            "(tools/calibrate_exits.py).",
            *(measured, here),
        )


def changes(cfg: CfgNode, within: str = "") -> list[str]:
    """The keys below ``within`` that ``OUTPUT_DIR/config.yaml`` has other values for."""
    file = Path(cfg.OUTPUT_DIR) / CONFIG_FILE
    if not file.is_file():
        return []
    changed = config.changed_keys(config.load_config(file), cfg)
    return [f"{k} {old!r} -> {new!r}" for k, (old, new) in changed.items() if k.startswith(within)]


def record_start(cfg: CfgNode, *, resume: bool) -> None:
    """Write ``config.yaml``, and say in the log what a reader of the run should know of it."""
    _write_config(cfg, resume=resume)
    _log_learning_rate(cfg)
    logger.info("%s", config.exit_summary(cfg))
    if not cfg.MODEL.WEIGHTS and not resume:
        _warn_of_frozen_noise(cfg)


def _write_config(cfg: CfgNode, *, resume: bool) -> None:
    """Write ``config.yaml``, and say what a resumed run changes; clean up after a killed run."""
    if not distributed.is_main():
        return
    for folder in _written_to(cfg):
        remove_leftovers(folder)
    for change in changes(cfg) if resume else ():
        logger.info("Resumed with another %s", change)
    with atomic_path(Path(cfg.OUTPUT_DIR) / CONFIG_FILE) as temporary:
        temporary.write_text(cfg.dump())


def _written_to(cfg: CfgNode) -> Iterator[Path]:
    """The folders that a run writes into: its own, and those of an evaluation on each test set."""
    output = Path(cfg.OUTPUT_DIR)
    for folder in (output, *(output / name for name in cfg.DATASETS.TEST)):
        yield folder
        yield from (folder / below for below in _OF_EVALUATIONS)


def _log_learning_rate(cfg: CfgNode) -> None:
    """Say what the rate is for how many images, and what the linear scaling rule would make of it.

    arXiv 1706.02677, section 2.1: the rate of SGD grows in proportion to the images of a step.
    """
    solver, processes = cfg.SOLVER, distributed.world_size()
    parts = cfg.CASCADE.ACCUMULATION_STEPS
    logger.info(
        "%s, learning rate %g for %d images per iteration: %d process(es) x %d part(s) x %d images",
        *(cfg.CASCADE.OPTIMIZER, solver.BASE_LR, solver.IMS_PER_BATCH),
        *(processes, parts, solver.IMS_PER_BATCH // processes // parts),
    )
    usual = _USUAL_LR * solver.IMS_PER_BATCH / _USUAL_IMAGES
    if cfg.CASCADE.OPTIMIZER == "SGD" and not usual / 2 <= solver.BASE_LR <= usual * 2:
        logger.info(
            "Detectron2's recipes have %g for %d images; by the linear scaling rule that is "
            "SOLVER.BASE_LR %g for these %d",
            *(_USUAL_LR, _USUAL_IMAGES, usual, solver.IMS_PER_BATCH),
        )


def _warn_of_frozen_noise(cfg: CfgNode) -> None:
    """From random weights, what is frozen stays random: seldom meant, and seen in the AP alone."""
    freeze_at, norm = cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.RESNETS.NORM
    if freeze_at > 0 or norm == "FrozenBN":
        logger.warning(
            "MODEL.WEIGHTS is empty, but MODEL.BACKBONE.FREEZE_AT is %d and MODEL.RESNETS.NORM is "
            "%s: give a file of weights, or set FREEZE_AT 0 and a NORM that is trained (BN, GN)",
            freeze_at,
            norm,
        )


def _check_trained_classes(class_names: Sequence[str] | None, dataset: CocoDataset) -> None:
    if class_names is not None and tuple(class_names) != tuple(dataset.class_names):
        raise DatasetError(
            f"{dataset.source.json_file} has the classes {', '.join(dataset.class_names)} (by "
            f"category id), but the checkpoint was trained on {', '.join(class_names)}: evaluate "
            "on the classes that were trained, in the same order"
        )
