"""What ``tools/train_net.py`` asks of this host; ``cascade_det.standalone`` has the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import detectron2.config
from detectron2.config import CfgNode
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.utils import comm

from cascade_det import config
from cascade_det.config import ConfigFiles
from cascade_det.d2.config_checks import check_model
from cascade_det.d2.detector import Detector
from cascade_det.d2.evaluate import evaluate, load_model
from cascade_det.d2.loader import build_test_loader
from cascade_det.d2.roi_heads import EarlyExitCascadeROIHeads
from cascade_det.d2.train import replay_batch, train
from cascade_det.data.coco import CocoDataset
from cascade_det.errors import ConfigError
from cascade_det.parallel import distributed

__all__ = [
    "check_config",
    "evaluate",
    "join",
    "load_config",
    "open_detector",
    "replay_batch",
    "train",
]


def open_detector(cfg: CfgNode) -> tuple[Detector, CocoDataset, Any]:
    """A trained detector with the first of ``DATASETS.TEST``; errors as of ``evaluate``.

    Raises:
        ConfigError: its heads are not ours.
    """
    model, datasets = load_model(cfg)
    detector = Detector(model)
    if not detector.has_stages:
        raise ConfigError(
            f"MODEL.ROI_HEADS.NAME is {cfg.MODEL.ROI_HEADS.NAME!r}: a model without our heads has "
            "no exits. Set it to EarlyExitCascadeROIHeads."
        )
    return detector, datasets[0], build_test_loader(cfg, datasets[0].source.name)


def load_config(config_files: ConfigFiles, opts: Sequence[Any] = ()) -> CfgNode:
    """Detectron2's configuration with our nodes, and files and options merged into it.

    Args and errors are those of :func:`cascade_det.config.load_config`.
    """
    cfg = detectron2.config.get_cfg()
    config.add_cascade_config(cfg)
    config.merge_config(cfg, config_files, opts)
    return cfg


def check_config(cfg: CfgNode) -> None:
    """Check what is ours, and that what is Detectron2's is there; the rest is left to it.

    Raises:
        ConfigError: lists every problem that was found, each with key, value and remedy.
    """
    config.check_run(cfg)
    check_model(cfg)
    name = cfg.MODEL.ROI_HEADS.NAME
    heads = ROI_HEADS_REGISTRY.get(name) if name in ROI_HEADS_REGISTRY else None
    if isinstance(heads, type) and issubclass(heads, EarlyExitCascadeROIHeads):
        config.check_heads(cfg)
    else:
        config.check_unread_cascade(cfg)


def join() -> None:
    """Tell Detectron2 of the processes that train together, once in each of them."""
    if distributed.world_size() > 1:
        per_machine = max(distributed.all_gather(distributed.local_rank())) + 1
        comm.create_local_process_group(per_machine)
