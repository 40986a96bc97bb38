"""COCO's matching of detections and objects, and the precision and recall it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools.cocoeval import COCOeval

IOU = 0.5


@dataclass(frozen=True)
class Matches:
    """COCO's matching at ``IOU``, a row per detection and a row per object.

    Detections take objects greedily, best score first. Whether one hits does not depend on
    detections with lower scores, so the matching holds for all score thresholds. Crowds and
    detections in them have no row.

    Attributes:
        images: ``[I]`` ids, ascending.
        detection_ids: int64 ``[D]``, ids in ``cocoDt``.
        scores: float64 ``[D]``.
        hits: bool ``[D]``, whether the detection matches an object.
        detection_images: int64 ``[D]``, indices into ``images``.
        detection_classes: int64 ``[D]``, indices of the category ids, ascending.
        object_ids: int64 ``[G]``, ids in ``cocoGt``.
        found_at: float64 ``[G]``, score of the object's detection; -inf for none.
        found_by: int64 ``[G]``, id of that detection; 0 for none.
        object_images: int64 ``[G]``, indices into ``images``.
        object_classes: int64 ``[G]``, the same for objects.
    """

    images: npt.NDArray[np.int64]
    detection_ids: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    hits: npt.NDArray[np.bool_]
    detection_images: npt.NDArray[np.int64]
    detection_classes: npt.NDArray[np.int64]
    object_ids: npt.NDArray[np.int64]
    found_at: npt.NDArray[np.float64]
    found_by: npt.NDArray[np.int64]
    object_images: npt.NDArray[np.int64]
    object_classes: npt.NDArray[np.int64]


def read_matches(evaluation: COCOeval) -> Matches:
    """Read the matching of a COCOeval, on the images and categories of its params."""
    params = evaluation.params
    row = int(np.argmin(np.abs(params.iouThrs - IOU)))
    shape = len(params.catIds), len(params.areaRng), len(params.imgIds)
    # COCOeval's matches of objects of all sizes [K, I]; None without objects and detections.
    grid = np.array(evaluation.evalImgs, dtype=object).reshape(shape)[:, 0]
    has_any = grid.astype(np.bool_)
    index_of, entries = np.argwhere(has_any), grid[has_any]

    detections = index_of.repeat([len(entry["dtIds"]) for entry in entries], axis=0)
    counted = ~_joined([entry["dtIgnore"][row] for entry in entries], np.bool_)
    objects = index_of.repeat([len(entry["gtIds"]) for entry in entries], axis=0)
    wanted = ~_joined([entry["gtIgnore"] for entry in entries], np.bool_)
    taken_by = _joined([entry["gtMatches"][row] for entry in entries], np.int64)
    # Ids start at 1; 0 is no match.
    score_of_id = [-np.inf, *(item["score"] for item in evaluation.cocoDt.dataset["annotations"])]
    return Matches(
        images=np.asarray(params.imgIds, np.int64),
        detection_ids=_joined([entry["dtIds"] for entry in entries], np.int64)[counted],
        scores=_joined([entry["dtScores"] for entry in entries], np.float64)[counted],
        hits=_joined([entry["dtMatches"][row] for entry in entries], np.bool_)[counted],
        detection_classes=detections[counted, 0],
        detection_images=detections[counted, 1],
        object_ids=_joined([entry["gtIds"] for entry in entries], np.int64)[wanted],
        found_at=np.array(score_of_id)[taken_by[wanted]],
        found_by=taken_by[wanted],
        object_classes=objects[wanted, 0],
        object_images=objects[wanted, 1],
    )


def point_at(
    scores: npt.NDArray[np.float64],
    hits: npt.NDArray[np.bool_],
    num_objects: int,
    threshold: float,
) -> dict[str, Any]:
    """Precision and recall of the detections with ``threshold`` or a higher score.

    Args:
        scores: ``[D]``.
        hits: ``[D]``.
        num_objects: the number of objects.
        threshold: of the score.

    Returns:
        ``IoU``, ``score``, ``true_positives``, ``false_positives``, ``misses``, and in percent
        ``precision``, ``recall`` and their harmonic mean ``F1``; nan for a share of nothing.
    """
    counted = scores >= threshold
    detections, found = int(counted.sum()), int(hits[counted].sum())
    return {
        "IoU": IOU,
        "score": threshold,
        "precision": _percent(found, detections),
        "recall": _percent(found, num_objects),
        "F1": _percent(2 * found, detections + num_objects),
        "true_positives": found,
        "false_positives": detections - found,
        "misses": num_objects - found,
    }


def best_point(
    scores: npt.NDArray[np.float64], hits: npt.NDArray[np.bool_], num_objects: int
) -> dict[str, Any]:
    """``point_at`` the score of the highest F1; of several scores, the highest.

    Without a hit the score is nan, and no detection counts.
    """
    order = np.argsort(-scores, kind="stable")
    found = hits[order].cumsum()
    # A threshold keeps all detections of a score or none.
    last = np.flatnonzero(np.diff(scores[order], append=-np.inf))
    f1 = 2 * found[last] / (last + 1 + num_objects)
    if not f1.any():
        return point_at(scores, hits, num_objects, float("nan"))
    return point_at(scores, hits, num_objects, float(scores[order][last[f1.argmax()]]))


def _joined(parts: list, dtype: npt.DTypeLike) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else float("nan")
