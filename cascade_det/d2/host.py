"""The functions that commands call in this host; ``cascade_det.standalone.host`` has the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import detectron2.config
from detectron2.config import CfgNode
from detectron2.modeling import ROI_HEADS_REGISTRY, SEM_SEG_HEADS_REGISTRY
from detectron2.utils import comm

from cascade_det import config
from cascade_det.config import ConfigFiles
from cascade_det.d2.config_checks import check_mask_heads, check_model
from cascade_det.d2.detector import Detector
from cascade_det.d2.evaluate import evaluate as evaluate_detector
from cascade_det.d2.evaluate import load_model
from cascade_det.d2.evaluate_segmenter import evaluate_segmenter, load_segmenter
from cascade_det.d2.loader import build_test_loader
from cascade_det.d2.mapper import check_augment
from cascade_det.d2.roi_heads import EarlyExitCascadeROIHeads
from cascade_det.d2.segmenter import Segmenter
from cascade_det.d2.sem_seg_head import CascadeSemSegHead
from cascade_det.d2.train import replay_batch
from cascade_det.d2.train import train as train_detector
from cascade_det.d2.train_segmenter import train_segmenter
from cascade_det.data.coco import CocoDataset
from cascade_det.data.semantic import SemanticDataset
from cascade_det.engine.semantic_datasets import semantic_test_loader
from cascade_det.errors import ConfigError
from cascade_det.parallel import distributed

__all__ = [
    "check_config",
    "evaluate",
    "join",
    "load_config",
    "open_detector",
    "open_segmenter",
    "replay_batch",
    "train",
]


def train(cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
    """Train a detector or a segmenter, see ``train`` and ``train_segmenter`` of this host."""
    if config.is_segmenter(cfg):
        return train_segmenter(cfg, resume=resume)
    return train_detector(cfg, resume=resume)


def evaluate(cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
    """Evaluate a detector or a segmenter, see ``evaluate`` and ``evaluate_segmenter``."""
    if config.is_segmenter(cfg):
        return evaluate_segmenter(cfg, resume=resume)
    return evaluate_detector(cfg, resume=resume)


def open_detector(cfg: CfgNode) -> tuple[Detector, CocoDataset, Any]:
    """The trained detector, the first of ``DATASETS.TEST`` and its loader.

    Errors as in ``evaluate``.

    Raises:
        ConfigError: the model does not use our heads.
    """
    model, datasets = load_model(cfg)
    detector = Detector(model)
    if not detector.has_stages:
        raise ConfigError(
            f"MODEL.ROI_HEADS.NAME is {cfg.MODEL.ROI_HEADS.NAME!r}: a model without our heads has "
            "no exits. Set it to EarlyExitCascadeROIHeads."
        )
    return detector, datasets[0], build_test_loader(cfg, datasets[0].source.name)


def open_segmenter(cfg: CfgNode) -> tuple[Segmenter, SemanticDataset, Any]:
    """The trained segmenter, the first of ``DATASETS.TEST`` and its loader.

    Errors as in ``evaluate``.

    Raises:
        ConfigError: the model does not use our head.
    """
    segmenter, datasets = load_segmenter(cfg)
    if not segmenter.has_levels:
        raise ConfigError(
            f"MODEL.SEM_SEG_HEAD.NAME is {cfg.MODEL.SEM_SEG_HEAD.NAME!r}: a model without our head "
            "has no exits. Set it to CascadeSemSegHead."
        )
    return segmenter, datasets[0], semantic_test_loader(cfg, datasets[0])


def load_config(config_files: ConfigFiles, opts: Sequence[Any] = ()) -> CfgNode:
    """Detectron2's configuration with our keys, merged with files and options.

    Args and errors as in :func:`cascade_det.config.load_config`.
    """
    cfg = detectron2.config.get_cfg()
    config.add_cascade_config(cfg)
    config.merge_config(cfg, config_files, opts)
    return cfg


def check_config(cfg: CfgNode) -> None:
    """Check our keys, and that the parts and feature maps named for Detectron2 exist.

    Raises:
        ConfigError: lists all errors, each with key, value and remedy.
    """
    config.check_run(cfg)
    check_model(cfg)
    if config.is_segmenter(cfg):
        head = SEM_SEG_HEADS_REGISTRY.get(cfg.MODEL.SEM_SEG_HEAD.NAME)
        if isinstance(head, type) and issubclass(head, CascadeSemSegHead):
            config.check_segmenter(cfg)
        else:
            config.check_unread_decoder(cfg)
        return
    check_augment(cfg)
    name = cfg.MODEL.ROI_HEADS.NAME
    heads = ROI_HEADS_REGISTRY.get(name) if name in ROI_HEADS_REGISTRY else None
    if isinstance(heads, type) and issubclass(heads, EarlyExitCascadeROIHeads):
        config.check_heads(cfg)
        if cfg.MODEL.MASK_ON:
            check_mask_heads(cfg)
    else:
        config.check_unread_cascade(cfg)


def join() -> None:
    """Register the process groups of this training with Detectron2; once in every process."""
    if distributed.world_size() > 1:
        per_machine = max(distributed.all_gather(distributed.local_rank())) + 1
        comm.create_local_process_group(per_machine)
