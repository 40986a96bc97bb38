"""Two evaluations on the same images: how far their AP differs, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools.cocoeval import COCOeval

from cascade_det.calibration.bootstrap import Difference, average_precision, paired_bootstrap
from cascade_det.calibration.image_matching import MatchedDetections
from cascade_det.evaluation.ground_truth import class_labels

METRICS = ("AP", "AP50", "AP75", "AP90")


@dataclass(frozen=True)
class ComparedMetric:
    """A metric in percent of two runs, and ``b - a`` in percent points."""

    a: float
    b: float
    difference: Difference


@dataclass(frozen=True)
class ComparedClass:
    """AP and AP50 of one class."""

    label: str
    objects: int
    metrics: Mapping[str, ComparedMetric]


@dataclass(frozen=True)
class RunComparison:
    """Of boxes or masks.

    Attributes:
        images: how many were resampled.
        overall: by name, of ``METRICS``.
        per_class: of the classes that have objects.
    """

    images: int
    overall: Mapping[str, ComparedMetric]
    per_class: Sequence[ComparedClass]


def compare_evaluations(a: COCOeval, b: COCOeval) -> RunComparison:
    """Compare two evaluations on the same images by resampling these, the same for both.

    Args:
        a: see ``run_cocoeval``; not by ``faster-coco-eval``.
        b: of other detections, on the same ground truth and images.
    """
    labels = list(class_labels(a.cocoGt.cats).values())
    pair = matched_by(a), matched_by(b)
    counts = pair[0].objects.sum(axis=0).tolist()
    per_class = [
        ComparedClass(label, count, _compared(_of_class(pair[0], k), _of_class(pair[1], k)))
        for k, (label, count) in enumerate(zip(labels, counts, strict=True))
        if count
    ]
    return RunComparison(len(pair[0].image_ids), _compared(*pair), per_class)


def matched_by(evaluation: COCOeval, *, size: str = "all") -> MatchedDetections:
    """What a COCOeval matched, of boxes or masks, on all its images.

    Args:
        evaluation: see ``run_cocoeval``.
        size: of the objects: ``all``, ``small``, ``medium`` or ``large``.
    """
    params = evaluation.params
    shape = len(params.catIds), len(params.areaRng), len(params.imgIds)
    # [I, K]; None without objects and detections.
    grid = np.array(evaluation.evalImgs, dtype=object).reshape(shape)
    grid = grid[:, params.areaRngLbl.index(size)].T
    places = np.argwhere(grid.astype(np.bool_))
    entries = [grid[image, index] for image, index in places.tolist()]
    counts = [len(entry["dtIds"]) for entry in entries]
    images, classes = places.repeat(counts, axis=0).reshape(-1, 2).T
    ignored = _joined([entry["dtIgnore"] for entry in entries], len(params.iouThrs)) > 0
    matches = _joined([entry["dtMatches"] for entry in entries], len(params.iouThrs)) > 0
    objects = np.zeros(grid.shape, np.int64)
    for (image, index), entry in zip(places.tolist(), entries, strict=True):
        objects[image, index] = np.count_nonzero(~np.asarray(entry["gtIgnore"], np.bool_))
    scores = [np.asarray(entry["dtScores"], np.float64) for entry in entries]
    return MatchedDetections(
        image_ids=np.asarray(params.imgIds, np.int64),
        images=images,
        classes=classes,
        scores=np.concatenate([np.zeros(0), *scores]),
        exit_stages=np.zeros(len(images), np.int64),
        hits=matches & ~ignored,
        ignored=ignored,
        objects=objects,
    )


def _joined(parts: Sequence[npt.NDArray[Any]], ious: int) -> npt.NDArray[np.float64]:
    shaped = (np.asarray(part, np.float64).reshape(ious, -1) for part in parts)
    return np.concatenate([np.zeros((ious, 0)), *shaped], axis=1)


def _of_class(matched: MatchedDetections, index: int) -> MatchedDetections:
    """The detections and objects of one class alone."""
    rows = matched.classes == index
    objects = np.zeros_like(matched.objects)
    objects[:, index] = matched.objects[:, index]
    return replace(
        matched,
        images=matched.images[rows],
        classes=matched.classes[rows],
        scores=matched.scores[rows],
        exit_stages=matched.exit_stages[rows],
        hits=matched.hits[:, rows],
        ignored=matched.ignored[:, rows],
        objects=objects,
    )


def _compared(a: MatchedDetections, b: MatchedDetections) -> dict[str, ComparedMetric]:
    before, after = average_precision(a), average_precision(b)
    differences = paired_bootstrap(a, b)
    return {name: ComparedMetric(before[name], after[name], differences[name]) for name in METRICS}
