"""The functions that commands call in this host; ``cascade_det.d2.host`` has the same."""

from typing import Any

from fvcore.common.config import CfgNode
from torch.utils.data import DataLoader

from cascade_det.config import (
    check_config,
    is_segmenter,
    load_config,
    require_detector,
    require_one_scale,
)
from cascade_det.data.coco import CocoDataset
from cascade_det.data.samples import Sample
from cascade_det.data.semantic import SemanticDataset
from cascade_det.engine.semantic_datasets import semantic_test_loader
from cascade_det.standalone.detector import Detector
from cascade_det.standalone.evaluate import evaluate as evaluate_detector
from cascade_det.standalone.evaluate import load_detector, test_loader
from cascade_det.standalone.evaluate_segmenter import evaluate_segmenter, load_segmenter
from cascade_det.standalone.segmenter import SemanticSegmentor
from cascade_det.standalone.train import replay_batch
from cascade_det.standalone.train import train as train_detector
from cascade_det.standalone.train_segmenter import train_segmenter

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
    if is_segmenter(cfg):
        return train_segmenter(cfg, resume=resume)
    return train_detector(cfg, resume=resume)


def evaluate(cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
    """Evaluate a detector or a segmenter, see ``evaluate`` and ``evaluate_segmenter``."""
    if is_segmenter(cfg):
        return evaluate_segmenter(cfg, resume=resume)
    return evaluate_detector(cfg, resume=resume)


def open_detector(cfg: CfgNode) -> tuple[Detector, CocoDataset, DataLoader[Sample]]:
    """The trained detector, the first of ``DATASETS.TEST`` and its loader.

    Errors as in ``evaluate``, and a ConfigError if the model is a segmenter.
    """
    require_detector(cfg)
    detector, datasets = load_detector(cfg)
    return detector, datasets[0], test_loader(cfg, datasets[0])


def open_segmenter(
    cfg: CfgNode,
) -> tuple[SemanticSegmentor, SemanticDataset, DataLoader[Sample]]:
    """The trained segmenter, the first of ``DATASETS.TEST`` and its loader.

    Errors as in ``evaluate``, and a ConfigError if the segmenter has two scales.
    """
    require_one_scale(cfg)
    segmenter, datasets = load_segmenter(cfg)
    assert isinstance(segmenter, SemanticSegmentor)
    return segmenter, datasets[0], semantic_test_loader(cfg, datasets[0])


def join() -> None:
    """Does nothing: the engine already knows the processes of this training."""
