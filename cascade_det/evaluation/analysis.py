"""Error analysis of a detector: precision and recall, confused classes, the worst images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cascade_det.evaluation.average_precision import ap_per_class
from cascade_det.evaluation.coco_matches import IOU, Matches, best_point, point_at, read_matches
from cascade_det.evaluation.confusion import confusion_matrix
from cascade_det.evaluation.curves import curves
from cascade_det.evaluation.ground_truth import class_labels

SCORE_THRESHOLD = 0.5
BACKGROUND = "background"
_WORST_IMAGES = 20


def analyze(
    evaluation: COCOeval,
    results: Sequence[Mapping[str, Any]],
    *,
    mask_truth: COCO | None = None,
    score_threshold: float = SCORE_THRESHOLD,
) -> dict[str, Any]:
    """Analyze an evaluation at ``coco_matches.IOU``.

    Args:
        evaluation: see ``run_cocoeval``.
        results: the detections of the evaluation.
        mask_truth: see ``load_mask_truth``; gives the boxes of the worst images their masks.
        score_threshold: the lowest score that counts.

    Returns:
        - ``task`` of the evaluation;
        - ``precision``, ``recall`` and ``F1`` of all classes together, in percent;
        - ``overall``: the same with counts (see ``coco_matches.point_at``), at the threshold and
          at the score of the best F1;
        - ``per_class``: a dict for each class in the order of the category ids, with ``class``
          (its label, see ``ground_truth.class_labels``, here and below), ``category_id``,
          ``objects``, ``AP``, ``AP50``, ``AP75``, the point at the threshold, and ``best``, the
          point of the best F1;
        - ``curves``: see ``curves.curves``;
        - ``confusion_matrix``: ``classes`` and ``counts``, see ``confusion.confusion_matrix``;
        - ``worst_images``: the images with the most mistakes, see below.

        A mistake is a false positive or a miss. An image has ``image_id``, ``file_name``,
        ``true_positives``, ``false_positives``, ``misses``, ``F1`` and ``boxes``; each box has
        ``kind`` (``found`` and ``missed`` are objects, ``false positive`` is a detection),
        ``class``, ``bbox`` (XYWH in pixels), for detections ``score``, and ``segmentation``
        (compressed RLE) if it has a mask; a found object has its ``detection`` with the same keys.
        Images are ranked by
        mistakes, which lower the overall F1, rather than by F1: by F1, an image with a single
        missed object would be among the worst.
    """
    matches = read_matches(evaluation)
    overall = [
        point_at(matches.scores, matches.hits, len(matches.object_ids), score_threshold),
        best_point(matches.scores, matches.hits, len(matches.object_ids)),
    ]
    labels = class_labels(evaluation.cocoGt.cats)
    counts = confusion_matrix(
        evaluation.cocoGt,
        results,
        evaluation.params.imgIds,
        score_threshold=score_threshold,
        iou_threshold=IOU,
        max_detections=evaluation.params.maxDets[-1],
        by_masks=evaluation.params.iouType == "segm",
    )
    return {
        "task": evaluation.params.iouType,
        **{name: overall[0][name] for name in ("precision", "recall", "F1")},
        "overall": overall,
        "per_class": _per_class(evaluation, matches, score_threshold),
        "curves": curves(evaluation, matches, list(labels.values())),
        "confusion_matrix": {"classes": [*labels.values(), BACKGROUND], "counts": counts.tolist()},
        "worst_images": _worst_images(evaluation, matches, score_threshold, mask_truth),
    }


def _per_class(
    evaluation: COCOeval, matches: Matches, score_threshold: float
) -> list[dict[str, Any]]:
    labels, rows = class_labels(evaluation.cocoGt.cats), []
    for index, (category_id, ap) in enumerate(ap_per_class(evaluation).items()):
        detected = matches.detection_classes == index
        of_class = (
            matches.scores[detected],
            matches.hits[detected],
            int((matches.object_classes == index).sum()),
        )
        rows.append(
            {
                "class": labels[category_id],
                "category_id": int(category_id),
                "objects": of_class[2],
                **ap,
                **point_at(*of_class, score_threshold),
                "best": best_point(*of_class),
            }
        )
    return rows


def _worst_images(
    evaluation: COCOeval, matches: Matches, score_threshold: float, mask_truth: COCO | None
) -> list[dict[str, Any]]:
    confident, found = matches.scores >= score_threshold, matches.found_at >= score_threshold
    hits = _count(matches, matches.object_images[found])
    misses = _count(matches, matches.object_images[~found])
    wrong = _count(matches, matches.detection_images[confident & ~matches.hits])
    mistakes = misses + wrong
    f1 = 200 * hits / np.maximum(2 * hits + mistakes, 1)
    worst = np.lexsort((matches.images, f1, -mistakes))[:_WORST_IMAGES]
    images = evaluation.cocoGt.imgs
    return [
        {
            "image_id": int(matches.images[index]),
            "file_name": images[matches.images[index]].get("file_name", ""),
            "true_positives": int(hits[index]),
            "false_positives": int(wrong[index]),
            "misses": int(misses[index]),
            "F1": float(f1[index]),
            "boxes": _boxes(evaluation, matches, index, score_threshold, mask_truth),
        }
        for index in worst
        if mistakes[index]
    ]


def _count(matches: Matches, image_indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.bincount(image_indices, minlength=len(matches.images))


def _boxes(
    evaluation: COCOeval,
    matches: Matches,
    image_index: int,
    score_threshold: float,
    mask_truth: COCO | None,
) -> list[dict[str, Any]]:
    """The boxes of an image: found objects, false positives, missed objects."""
    here = matches.object_images == image_index
    found = matches.found_at >= score_threshold
    wrong = (
        (matches.detection_images == image_index)
        & (matches.scores >= score_threshold)
        & ~matches.hits
    )
    truth, detected = (mask_truth or evaluation.cocoGt).anns, evaluation.cocoDt.anns
    labels = class_labels(evaluation.cocoGt.cats)
    shown = ("score",) if mask_truth is None else ("score", "segmentation")

    def entry(item: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "class": labels[item["category_id"]],
            "bbox": item["bbox"],
            # In ``mask_truth`` an object without a mask is a crowd, with all of its box.
            **{key: item[key] for key in shown if key in item and not item["iscrowd"]},
        }

    hit, missed = here & found, here & ~found
    return [
        *(
            {"kind": "found", **entry(truth[number]), "detection": entry(detected[by])}
            for number, by in zip(matches.object_ids[hit], matches.found_by[hit], strict=True)
        ),
        *(
            {"kind": "false positive", **entry(detected[number])}
            for number in matches.detection_ids[wrong]
        ),
        *({"kind": "missed", **entry(truth[number])} for number in matches.object_ids[missed]),
    ]
