"""The functions that commands call in this host; ``cascade_det.d2.host`` has the same."""

from fvcore.common.config import CfgNode
from torch.utils.data import DataLoader

from cascade_det.config import check_config, load_config
from cascade_det.data.coco import CocoDataset
from cascade_det.data.samples import Sample
from cascade_det.standalone.detector import Detector
from cascade_det.standalone.evaluate import evaluate, load_detector, test_loader
from cascade_det.standalone.train import replay_batch, train

__all__ = [
    "check_config",
    "evaluate",
    "join",
    "load_config",
    "open_detector",
    "replay_batch",
    "train",
]


def open_detector(cfg: CfgNode) -> tuple[Detector, CocoDataset, DataLoader[Sample]]:
    """The trained detector, the first of ``DATASETS.TEST`` and its loader.

    Errors as in ``evaluate``.
    """
    detector, datasets = load_detector(cfg)
    return detector, datasets[0], test_loader(cfg, datasets[0])


def join() -> None:
    """Does nothing: the engine already knows the processes of this training."""
