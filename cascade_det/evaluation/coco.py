"""COCO average precision of a detector, as Detectron2 reports it."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from cascade_det.core.structures import DetectorOutput
from cascade_det.data.coco_results import coco_results, encode_masks
from cascade_det.data.samples import Sample
from cascade_det.evaluation.analysis import SCORE_THRESHOLD, analyze
from cascade_det.evaluation.ap_warnings import (
    explain,
    missing_masks,
    too_many_objects_warning,
    unprocessed_warning,
)
from cascade_det.evaluation.average_precision import (
    MAX_DETECTIONS,
    ap_metrics,
    coco_ap,
    detections_limit,
    has_fast_cocoeval,
    run_cocoeval,
)
from cascade_det.evaluation.evaluator import Evaluator
from cascade_det.evaluation.ground_truth import (
    admit_images,
    load_ground_truth,
    load_mask_truth,
    merge_seen,
)
from cascade_det.files import write_json

logger = logging.getLogger(__name__)

_LIMIT_KEY = "TEST.DETECTIONS_PER_IMAGE"
RESULTS_FILE = Path("inference", "coco_instances_results.json")


class CocoEvaluator(Evaluator):
    """Average precision over a COCO-format data set, of boxes and, if there are any, of masks.

    Args:
        ground_truth: the content of a COCO-format json, see ``load_ground_truth``.
        category_ids: category id in the json of each class ``0..K-1`` of the detector.
        output_dir: folder of the run; the detections are written below it, to
            ``inference/coco_instances_results.json``. ``None``: nothing is written.
        detections_per_image: the detector's limit. COCO counts 100 detections per class and image,
            or as many as this limit, if it is higher.

    Raises:
        DatasetError: the ground truth cannot be used.
    """

    def __init__(
        self,
        *,
        ground_truth: Mapping[str, Any],
        category_ids: Sequence[int],
        output_dir: str | os.PathLike[str] | None = None,
        detections_per_image: int = MAX_DETECTIONS,
    ) -> None:
        self._ground_truth = ground_truth
        self._coco_gt = load_ground_truth(ground_truth)
        self._category_ids = tuple(category_ids)
        self._output_dir = output_dir
        self._detections_per_image = detections_per_image
        self.reset()

    def reset(self) -> None:
        """Discard everything that was processed."""
        self._seen: set[int] = set()
        self._results: list[dict[str, Any]] = []
        self._has_masks = False

    def process(self, batch: Sequence[Sample], output: DetectorOutput) -> None:
        """Add the detections of a batch, in pixels of the original images.

        Raises:
            DatasetError: an image is not in the json or was processed before, or a class
                index has no category.
        """
        admit_images(batch, output.detections, self._coco_gt, self._seen)
        for sample, detections in zip(batch, output.detections, strict=True):
            image = self._coco_gt.imgs[sample["image_id"]]
            masks = None
            if detections.masks is not None:  # else the sizes of images may be unknown
                masks = encode_masks(detections, image["height"], image["width"])
                self._has_masks = True
            self._results += coco_results(detections, image["id"], self._category_ids, masks)

    def state(self) -> dict[str, Any]:
        """``seen`` image ids, ``results`` in COCO's result format, ``has_masks``."""
        return {
            "seen": sorted(self._seen),
            "results": self._results,
            "has_masks": self._has_masks,
        }

    def merge(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue from the states of all processes.

        Raises:
            DatasetError: two processes saw the same image.
        """
        self._seen = merge_seen(state["seen"] for state in states)
        self._results = [result for state in states for result in state["results"]]
        self._has_masks = any(state["has_masks"] for state in states)

    def evaluate(self) -> dict[str, Any]:
        """``{"bbox": {"AP": ..., "AP-<class>": ...}, "analysis": {...}, "notes": [...]}``.

        AP is in percent; ``segm`` is that of masks, for a detector that has them. See
        ``score_results``. As in Detectron2, all images of the json count, even if they were not
        processed.
        """
        if self._output_dir is not None:
            write_json(self._results, Path(self._output_dir) / RESULTS_FILE)
        image_ids = sorted(self._coco_gt.imgs)
        scored = score_results(
            self._coco_gt,
            self._results,
            image_ids,
            mask_truth=load_mask_truth(self._ground_truth) if self._has_masks else None,
            max_detections=detections_limit(self._detections_per_image),
        )
        if scored["bbox"]:
            scored["notes"] = [
                *unprocessed_warning(image_ids, self._seen),
                *too_many_objects_warning(
                    self._coco_gt, image_ids, self._detections_per_image, _LIMIT_KEY
                ),
                *scored["notes"],
            ]
        for warning in scored["notes"]:
            logger.warning(warning)
        return scored


def score_results(
    coco_gt: COCO,
    results: Sequence[Mapping[str, Any]],
    image_ids: Collection[int],
    *,
    mask_truth: COCO | None = None,
    by_masks: bool = False,
    score_threshold: float = SCORE_THRESHOLD,
    max_detections: int = MAX_DETECTIONS,
) -> dict[str, Any]:
    """All metrics of detections.

    Args:
        coco_gt: ground truth, see ``load_ground_truth``.
        results: detections in COCO's result format.
        image_ids: images to evaluate on.
        mask_truth: the same ground truth for masks, see ``load_mask_truth``; ``None`` if the
            detector has no masks.
        by_masks: whether the analysis matches objects by their masks rather than their boxes.
        score_threshold: the lowest score that counts in the analysis.
        max_detections: how many count per class and image, best score first.

    Returns:
        ``bbox`` (see ``ap_metrics``), ``analysis`` (see ``analyze``) and ``notes``, warnings (see
        ``explain``). For masks also ``segm`` and, where ``faster-coco-eval`` is installed,
        ``boundary``. Without annotations they are empty.
    """
    if "annotations" not in coco_gt.dataset:
        warning = "The json has no annotations: AP cannot be computed."
        return {"bbox": {}, "analysis": {}, "notes": [warning]}
    truths = {"bbox": coco_gt} | ({} if mask_truth is None else {"segm": mask_truth})
    evaluations = {
        task: run_cocoeval(truth, results, image_ids, task=task, max_detections=max_detections)
        for task, truth in truths.items()
    }
    metrics = {task: ap_metrics(evaluation) for task, evaluation in evaluations.items()}
    notes = explain(metrics["bbox"], coco_gt, results, image_ids)
    if mask_truth is not None:
        notes += missing_masks(coco_gt, results, image_ids)
        if has_fast_cocoeval():
            metrics["boundary"] = coco_ap(
                mask_truth, results, image_ids, task="boundary", max_detections=max_detections
            )
    analysis = analyze(
        evaluations["segm" if by_masks else "bbox"],
        results,
        mask_truth=mask_truth,
        score_threshold=score_threshold,
    )
    return {**metrics, "analysis": analysis, "notes": notes}
