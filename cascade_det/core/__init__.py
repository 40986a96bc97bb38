"""The cascade in plain PyTorch: features and proposals in, losses or detections out."""

from cascade_det.core.box_head import BoxPredictor, ConvFCBoxHead
from cascade_det.core.cascade import CascadeHead
from cascade_det.core.exits import ExitPolicy, build_exits
from cascade_det.core.fast_heads import FastCopies
from cascade_det.core.mask_branch import MaskBranch, MaskRules
from cascade_det.core.mask_head import ConvUpsampleMaskHead
from cascade_det.core.roi_pooling import RoIPooler
from cascade_det.core.structures import (
    CascadeInputs,
    CascadeStats,
    Detections,
    DetectorOutput,
    PartTimer,
)
from cascade_det.core.training_schedule import TrainingSchedule, build_training_schedule

__all__ = [
    "BoxPredictor",
    "CascadeHead",
    "CascadeInputs",
    "CascadeStats",
    "ConvFCBoxHead",
    "ConvUpsampleMaskHead",
    "Detections",
    "DetectorOutput",
    "ExitPolicy",
    "FastCopies",
    "MaskBranch",
    "MaskRules",
    "PartTimer",
    "RoIPooler",
    "TrainingSchedule",
    "build_exits",
    "build_training_schedule",
]
