"""Detections in, figures out: COCO AP, AP per stage, exit rates, latency, and their report.

``figures`` (matplotlib) is imported by name, so that a training run that does not need it does not
load it.
"""

from cascade_det.evaluation.agreement import agreement_loss
from cascade_det.evaluation.average_precision import coco_ap
from cascade_det.evaluation.coco import CocoEvaluator, score_results
from cascade_det.evaluation.defaults import default_evaluators
from cascade_det.evaluation.evaluator import Evaluator
from cascade_det.evaluation.exits import ExitEvaluator, RegionFlops
from cascade_det.evaluation.latency import LatencyEvaluator
from cascade_det.evaluation.notes import explain
from cascade_det.evaluation.report import describe_machine, format_report, write_results
from cascade_det.evaluation.shadow import ShadowEvaluator, ShadowRules
from cascade_det.evaluation.stages import StageEvaluator

__all__ = [
    "CocoEvaluator",
    "Evaluator",
    "ExitEvaluator",
    "LatencyEvaluator",
    "RegionFlops",
    "ShadowEvaluator",
    "ShadowRules",
    "StageEvaluator",
    "agreement_loss",
    "coco_ap",
    "default_evaluators",
    "describe_machine",
    "explain",
    "format_report",
    "score_results",
    "write_results",
]
