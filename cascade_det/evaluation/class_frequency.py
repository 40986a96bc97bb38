"""AP of rare, common and frequent classes, as LVIS reports it (arXiv 1908.03195)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from cascade_det.evaluation.average_precision import (
    MAX_DETECTIONS,
    detections_limit,
    mean_precision,
    run_cocoeval,
)
from cascade_det.evaluation.coco import CocoEvaluator
from cascade_det.evaluation.ground_truth import load_ground_truth, load_mask_truth

# By the number of training images that have the class: 1 to 10, 11 to 100, more.
FREQUENCIES = ("r", "c", "f")
_MOST = (10, 100)


def frequency_of(num_images: int) -> str:
    """``"r"``, ``"c"`` or ``"f"``: of a class that so many training images have."""
    return FREQUENCIES[sum(num_images > most for most in _MOST)]


class FrequencyEvaluator(CocoEvaluator):
    """AP over classes of one frequency: ``APr``, ``APc`` and ``APf``; needs ``faster-coco-eval``.

    Where an image has ``neg_category_ids``, it is annotated for some classes only, as in LVIS: for
    the classes of its objects and for those, which it does not show. Detections of others do not
    count, and a detection of a class in ``not_exhaustive_category_ids`` that hits nothing is no
    false positive.

    Args:
        ground_truth: the content of a COCO-format json, see ``load_ground_truth``.
        category_ids: category id in the json of each class ``0..K-1`` of the detector.
        frequencies: one of ``FREQUENCIES`` for each category id.
        detections_per_image: see ``CocoEvaluator``.
    """

    def __init__(
        self,
        *,
        ground_truth: Mapping[str, Any],
        category_ids: Sequence[int],
        frequencies: Mapping[int, str],
        detections_per_image: int = MAX_DETECTIONS,
    ) -> None:
        super().__init__(
            ground_truth=ground_truth,
            category_ids=category_ids,
            detections_per_image=detections_per_image,
        )
        self._frequencies = dict(frequencies)

    def evaluate(self) -> dict[str, Any]:
        """``{"lvis": {"AP": ..., "APr": ..., "APc": ..., "APf": ...}}``, in percent, of boxes.

        ``lvis_segm`` are those of masks. A frequency without classes with objects is nan.
        """
        if "annotations" not in self._ground_truth:
            return {}
        found = {"lvis": self._metrics("bbox", load_ground_truth(self._ground_truth))}
        if self._has_masks:
            found["lvis_segm"] = self._metrics("segm", load_mask_truth(self._ground_truth))
        return found

    def _metrics(self, task: str, truth: COCO) -> dict[str, float]:
        evaluation = run_cocoeval(
            truth,
            self._results,
            sorted(truth.imgs),
            task=task,
            max_detections=detections_limit(self._detections_per_image),
            fast=True,
            frequencies=self._frequencies if _is_federated(truth) else None,
        )
        precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, category]
        kinds = np.array([self._frequencies[i] for i in evaluation.params.catIds])
        groups = {f"AP{kind}": precision[:, :, kinds == kind] for kind in FREQUENCIES}
        return {
            "AP": mean_precision(precision),
            **{name: mean_precision(own) for name, own in groups.items()},
        }


def _is_federated(truth: COCO) -> bool:
    return any("neg_category_ids" in image for image in truth.dataset["images"])
