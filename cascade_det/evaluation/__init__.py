"""Detections in, metrics out: COCO AP, AP per stage, exit rates, latency."""

from cascade_det.evaluation.agreement import agreement_loss
from cascade_det.evaluation.ap_warnings import explain
from cascade_det.evaluation.average_precision import coco_ap
from cascade_det.evaluation.coco import CocoEvaluator, score_results
from cascade_det.evaluation.defaults import default_evaluators
from cascade_det.evaluation.evaluator import Evaluator
from cascade_det.evaluation.exits import ExitEvaluator, RegionFlops
from cascade_det.evaluation.latency import LatencyEvaluator
from cascade_det.evaluation.stages import StageEvaluator

__all__ = [
    "CocoEvaluator",
    "Evaluator",
    "ExitEvaluator",
    "LatencyEvaluator",
    "RegionFlops",
    "StageEvaluator",
    "agreement_loss",
    "coco_ap",
    "default_evaluators",
    "explain",
    "score_results",
]
