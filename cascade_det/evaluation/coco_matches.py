"""Which detections hit an object, by COCO's rules, and what precision and recall follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools.cocoeval import COCOeval

IOU = 0.5


@dataclass(frozen=True)
class Matches:
    """COCO's matching at ``IOU``, a row per detection and a row per object.

    Class by class and image by image, detections take the object of the highest IoU that is
    free, best score first, as many of them as the evaluation counts. So whether one hits does not
    depend on those with lower scores, and one matching holds for all score thresholds. Crowds and
    what lies in them have no row.

    Attributes:
        images: ``[I]`` ids, ascending.
        classes: ``[K]`` category ids, ascending.
        detection_ids: int64 ``[D]``, ids in ``cocoDt``.
        scores: float64 ``[D]``.
        hits: bool ``[D]``, whether the detection takes an object.
        detection_images: int64 ``[D]``, indices into ``images``.
        detection_classes: int64 ``[D]``, indices into ``classes``.
        object_ids: int64 ``[G]``, ids in ``cocoGt``.
        found_at: float64 ``[G]``, score of the detection that takes the object; -inf for none.
        object_images: int64 ``[G]``, indices into ``images``.
        object_classes: int64 ``[G]``, indices into ``classes``.
    """

    images: npt.NDArray[np.int64]
    classes: npt.NDArray[np.int64]
    detection_ids: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    hits: npt.NDArray[np.bool_]
    detection_images: npt.NDArray[np.int64]
    detection_classes: npt.NDArray[np.int64]
    object_ids: npt.NDArray[np.int64]
    found_at: npt.NDArray[np.float64]
    object_images: npt.NDArray[np.int64]
    object_classes: npt.NDArray[np.int64]


def read_matches(evaluation: COCOeval) -> Matches:
    """The matching that a COCOeval made; its images and categories are those of its params."""
    row = int(np.argmin(np.abs(evaluation.params.iouThrs - IOU)))
    places, entries = [], []
    for place, entry in _entries_of_all_sizes(evaluation):
        places.append(place)
        entries.append(entry)
    place_of = np.array(places, np.int64).reshape(-1, 2)

    detections = place_of.repeat([len(entry["dtIds"]) for entry in entries], axis=0)
    counted = ~_joined([entry["dtIgnore"][row] for entry in entries], np.bool_)
    objects = place_of.repeat([len(entry["gtIds"]) for entry in entries], axis=0)
    wanted = ~_joined([entry["gtIgnore"] for entry in entries], np.bool_)
    taken_by = _joined([entry["gtMatches"][row] for entry in entries], np.int64)
    # Ids count from 1, and 0 stands for no match.
    score_of_id = [-np.inf, *(item["score"] for item in evaluation.cocoDt.dataset["annotations"])]
    return Matches(
        images=np.asarray(evaluation.params.imgIds, np.int64),
        classes=np.asarray(evaluation.params.catIds, np.int64),
        detection_ids=_joined([entry["dtIds"] for entry in entries], np.int64)[counted],
        scores=_joined([entry["dtScores"] for entry in entries], np.float64)[counted],
        hits=_joined([entry["dtMatches"][row] for entry in entries], np.bool_)[counted],
        detection_classes=detections[counted, 0],
        detection_images=detections[counted, 1],
        object_ids=_joined([entry["gtIds"] for entry in entries], np.int64)[wanted],
        found_at=np.array(score_of_id)[taken_by[wanted]],
        object_classes=objects[wanted, 0],
        object_images=objects[wanted, 1],
    )


def point_at(
    scores: npt.NDArray[np.float64],
    hits: npt.NDArray[np.bool_],
    num_objects: int,
    threshold: float,
) -> dict[str, Any]:
    """What counting the detections with ``threshold`` or a higher score gives.

    Args:
        scores: ``[D]``.
        hits: ``[D]``.
        num_objects: all that could be hit.
        threshold: of the score.

    Returns:
        ``IoU``, ``score``, ``true_positives``, ``false_positives``, ``misses``, and in percent
        ``precision`` (of the detections), ``recall`` (of the objects) and their harmonic mean
        ``F1``; nan where there is nothing to take a share of.
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
    """As ``point_at``, at the score where F1 is highest; of several, the highest score.

    Without a hit no score is better than another: it is nan, and nothing is counted.
    """
    order = np.argsort(-scores, kind="stable")
    found = hits[order].cumsum()
    # A threshold takes all detections of one score or none.
    last = np.flatnonzero(np.diff(scores[order], append=-np.inf))
    f1 = 2 * found[last] / (last + 1 + num_objects)
    if not f1.any():
        return point_at(scores, hits, num_objects, float("nan"))
    return point_at(scores, hits, num_objects, float(scores[order][last[f1.argmax()]]))


def _entries_of_all_sizes(evaluation: COCOeval) -> Iterator[tuple[tuple[int, int], dict]]:
    """(index of class, index of image) and what COCOeval found there, where there is anything."""
    num_areas, num_images = len(evaluation.params.areaRng), len(evaluation.params.imgIds)
    for class_index in range(len(evaluation.params.catIds)):
        start = class_index * num_areas * num_images  # Area range 0 is "all".
        for image_index, entry in enumerate(evaluation.evalImgs[start : start + num_images]):
            if entry is not None:
                yield (class_index, image_index), entry


def _joined(parts: list, dtype: npt.DTypeLike) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else float("nan")
