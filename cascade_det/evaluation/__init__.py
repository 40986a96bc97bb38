"""Detections and label maps in, metrics out: AP, exit rates, latency; IoU, Dice, distances."""

from cascade_det.evaluation.agreement import Agreement, agreement_loss, find_again
from cascade_det.evaluation.ap_warnings import explain
from cascade_det.evaluation.average_precision import coco_ap
from cascade_det.evaluation.coco import CocoEvaluator, score_results
from cascade_det.evaluation.defaults import default_evaluators
from cascade_det.evaluation.evaluator import Evaluator
from cascade_det.evaluation.exits import ExitEvaluator, RegionFlops
from cascade_det.evaluation.latency import LatencyEvaluator
from cascade_det.evaluation.semantic import SemanticEvaluator
from cascade_det.evaluation.stages import StageEvaluator
from cascade_det.evaluation.volume_evaluator import VolumeEvaluator, VolumeSlice

__all__ = [
    "Agreement",
    "CocoEvaluator",
    "Evaluator",
    "ExitEvaluator",
    "LatencyEvaluator",
    "RegionFlops",
    "SemanticEvaluator",
    "StageEvaluator",
    "VolumeEvaluator",
    "VolumeSlice",
    "agreement_loss",
    "coco_ap",
    "default_evaluators",
    "explain",
    "find_again",
    "score_results",
]
