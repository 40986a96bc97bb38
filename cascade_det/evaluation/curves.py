"""Precision over recall and F1 over the score of a detector, as curves to draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools.cocoeval import COCOeval

from cascade_det.evaluation.coco_matches import IOU, Matches

_POINTS = 101  # As COCO's recalls.
_DIGITS = 2  # Of percentages: the results of thousands of classes stay readable.
_MEANS = {"AP50": 0, "AP75": 5}  # Indices of IoU 0.50, 0.55, ...
_Values = npt.NDArray[np.float64]


def curves(evaluation: COCOeval, matches: Matches, labels: Sequence[str]) -> dict[str, Any]:
    """The curves of an evaluation.

    Args:
        evaluation: see ``run_cocoeval``.
        matches: of the evaluation.
        labels: of the K classes.

    Returns:
        - ``recalls``: COCO's 101, in percent;
        - ``precision_AP``, ``precision_AP50``, ``precision_AP75``: at these recalls, in percent,
          the mean over the classes that have objects, and of the first over all IoUs;
        - ``scores``: 101 thresholds, from 0 to 1, or further if scores are;
        - ``F1``: at these thresholds, of all classes together, at ``coco_matches.IOU``;
        - ``per_class``: a dict for each class, with ``class``, ``precision`` and ``F1`` at that
          IoU. Both are empty for a class without objects.

        Numbers are rounded to two digits.
    """
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, class]
    own = precision[int(np.argmin(np.abs(evaluation.params.iouThrs - IOU)))]
    has_objects = precision[0, 0] > -1
    ends = [0.0, 1.0]
    if len(matches.scores):
        ends += [float(matches.scores.min()), float(matches.scores.max())]
    thresholds = np.linspace(min(ends), max(ends), _POINTS)
    per_class = []
    for index, label in enumerate(labels):
        found: dict[str, Any] = {"class": label, "precision": [], "F1": []}
        if has_objects[index]:
            detected = matches.detection_classes == index
            objects = int((matches.object_classes == index).sum())
            of_class = matches.scores[detected], matches.hits[detected]
            found["precision"] = _percent(own[:, index])
            found["F1"] = _percent(f1_at(*of_class, objects, thresholds))
        per_class.append(found)
    f1 = f1_at(matches.scores, matches.hits, len(matches.object_ids), thresholds)
    counted = precision[:, :, has_objects]
    with_any = counted.size > 0
    return {
        "recalls": _percent(evaluation.params.recThrs),
        "precision_AP": _percent(counted.mean(axis=(0, 2))) if with_any else [],
        **{
            f"precision_{name}": _percent(counted[row].mean(axis=1)) if with_any else []
            for name, row in _MEANS.items()
        },
        "scores": np.round(thresholds, 4).tolist(),
        "F1": _percent(f1),
        "per_class": per_class,
    }


def f1_at(
    scores: _Values, hits: npt.NDArray[np.bool_], num_objects: int, thresholds: _Values
) -> _Values:
    """F1 ``[T]`` in 0..1 of the detections with each of the T thresholds or a higher score.

    Args:
        scores: ``[D]``.
        hits: ``[D]``, whether a detection matches an object.
        num_objects: the number of objects.
        thresholds: ``[T]``.

    Returns:
        nan where there are neither objects nor detections.
    """
    order = np.argsort(-scores, kind="stable")
    count = np.searchsorted(-scores[order], -thresholds, side="right")
    found = np.concatenate([[0], hits[order].cumsum()])[count]
    whole = count + num_objects
    return np.divide(2 * found, whole, out=np.full(len(count), np.nan), where=whole > 0)


def _percent(values: _Values) -> list[float]:
    rounded: list[float] = np.round(100 * values, _DIGITS).tolist()
    return rounded
