"""The evaluators of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from cascade_det.evaluation.average_precision import MAX_DETECTIONS
from cascade_det.evaluation.coco import CocoEvaluator
from cascade_det.evaluation.evaluator import Evaluator
from cascade_det.evaluation.exits import ExitEvaluator, RegionFlops
from cascade_det.evaluation.latency import LatencyEvaluator
from cascade_det.evaluation.stages import StageEvaluator


def default_evaluators(
    *,
    ground_truth: Mapping[str, Any],
    category_ids: Sequence[int],
    output_dir: str | os.PathLike[str] | None = None,
    detections_per_image: int = MAX_DETECTIONS,
    stages: bool = True,
    fast_ap: bool = False,
    warmup: int = 5,
    flops: RegionFlops | None = None,
) -> list[Evaluator]:
    """Evaluators of AP, exit rates, latency and, with ``stages``, AP per stage.

    ``StageEvaluator`` needs a detector that is run with ``stages=True``, ``LatencyEvaluator`` one
    that is run with a timer. See the evaluators for the arguments.
    """
    evaluators: list[Evaluator] = [
        CocoEvaluator(
            ground_truth=ground_truth,
            category_ids=category_ids,
            output_dir=output_dir,
            detections_per_image=detections_per_image,
        )
    ]
    if stages:
        evaluators.append(
            StageEvaluator(
                ground_truth=ground_truth,
                category_ids=category_ids,
                detections_per_image=detections_per_image,
                fast_ap=fast_ap,
            )
        )
    return [*evaluators, ExitEvaluator(flops), LatencyEvaluator(warmup=warmup)]
