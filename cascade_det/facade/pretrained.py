"""Folders with a trained detector: ``config.yaml`` and a file of weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from fvcore.common.config import BASE_KEY, CfgNode

from cascade_det import config
from cascade_det.config.yaml_files import read_entries, read_text
from cascade_det.engine.output_dir import CONFIG_FILE
from cascade_det.errors import CheckpointError, ConfigError
from cascade_det.files import atomic_path
from cascade_det.standalone.build import build_detector
from cascade_det.weights import load_weights, write_safetensors

WEIGHTS_FILE = "model.safetensors"
# Of a run, its best weights, or else the last ones.
_OF_RUNS = ("model_best.pth", "model_final.pth")
# What belongs to one machine or one run, not to a detector: a key, or a group.
_LOCAL = (
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "MODEL.CASCADE.FAST.IMAGES",  # images of DATASETS.TRAIN
    "DATASETS.",
    "DATALOADER.NUM_WORKERS",
    "OUTPUT_DIR",
    "CASCADE.DATASETS",
    "CASCADE.SEMANTIC_DATASETS",
    "CASCADE.FOLLOW_LINKS",
    "CASCADE.LOGGERS",
)


def open_folder(folder: Path, *, downloaded: bool = False) -> CfgNode:
    """The configuration of a detector in a folder, with its file of weights.

    Args:
        folder: has ``config.yaml`` and ``model.safetensors``, or is the output of a run.
        downloaded: both files come from a stranger: only safetensors are taken, and a
            configuration that names further files is refused.

    Returns:
        A configuration as of ``portable``, with ``MODEL.WEIGHTS``.

    Raises:
        CheckpointError: there are no weights.
        ConfigError: there is no configuration, it cannot be used or is not of a detector.
    """
    names = (WEIGHTS_FILE,) if downloaded else (WEIGHTS_FILE, *_OF_RUNS)
    return open_file(_first(folder, names), downloaded=downloaded)


def open_file(weights: Path, *, downloaded: bool = False) -> CfgNode:
    """As ``open_folder``, for a file of weights beside its ``config.yaml``."""
    path = weights.parent / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(
            f"{weights}: there is no {CONFIG_FILE} beside it. Put the configuration of its "
            "training there, as the output folder of a run has it."
        )
    if downloaded and any(e.key == BASE_KEY for e in read_entries(read_text(path), path)):
        raise ConfigError(
            f"{path}: has a {BASE_KEY}, which is not followed from a downloaded file. A file from "
            "save_pretrained() has every value itself."
        )
    return portable(config.load_config(path), weights.absolute())


def weights_of_run(folder: Path, *, evaluated: bool) -> Path:
    """The best weights of a run that was evaluated, else its last ones.

    Args:
        folder: the output of the run.
        evaluated: whether it was; the best weights of a run that this one resumed are older.

    Raises:
        CheckpointError: there are none.
    """
    return _first(folder, _OF_RUNS if evaluated else _OF_RUNS[-1:]).absolute()


def portable(cfg: CfgNode, weights: str | Path) -> CfgNode:
    """A configuration without what belongs to one machine or run: device, data, output, trackers.

    So a configuration from elsewhere opens no file here, writes none and sends nothing. 8-bit
    inference, which needs images, becomes automatic.

    Args:
        cfg: any; it is not changed.
        weights: for ``MODEL.WEIGHTS``.

    Raises:
        ConfigError: it is not of a detector.
    """
    config.require_detector(cfg)
    local = {
        key: value
        for key, value in config.flat(config.get_cfg()).items()
        if any(key == name or (name[-1] == "." and key.startswith(name)) for name in _LOCAL)
    }
    if cfg.MODEL.CASCADE.FAST.DTYPE == "int8":
        local["MODEL.CASCADE.FAST.DTYPE"] = "auto"
    local["MODEL.WEIGHTS"] = str(weights)
    local["MODEL.DEVICE"] = "cuda" if torch.cuda.is_available() else "cpu"
    local["DATALOADER.NUM_WORKERS"] = min(local["DATALOADER.NUM_WORKERS"], os.cpu_count() or 1)
    return config.changed(cfg, *(item for pair in local.items() for item in pair))


def write_folder(cfg: CfgNode, class_names: list[str], category_ids: list[int], to: Path) -> None:
    """Write ``config.yaml`` and ``model.safetensors``, with the classes in its metadata.

    Args:
        cfg: with ``MODEL.WEIGHTS``.
        class_names: K names.
        category_ids: K ids.
        to: folder, made if missing.

    Raises:
        CheckpointError: the weights cannot be read or do not fit, or safetensors is missing.
    """
    # Built anew: the weights of an optimised detector are folded.
    detector = build_detector(cfg)
    load_weights(detector, cfg.MODEL.WEIGHTS, complete=True)
    run = {"class_names": class_names, "category_ids": category_ids}
    write_safetensors(detector.state_dict(), run, to / WEIGHTS_FILE)
    with atomic_path(to / CONFIG_FILE) as temporary:
        temporary.write_text(portable(cfg, "").dump(), encoding="utf-8")


def _first(folder: Path, names: Sequence[str]) -> Path:
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder}: has no weights: {' or '.join(names)}")
    return file
