"""Average precision of weighted images, and the bootstrap of a difference of two.

B sets of image weights, I images, K classes, T IoU thresholds. A weight is the
number of copies of an image: 0 and 1 for a subset, counts for a resample (Efron 1979).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cascade_det.calibration.image_matching import IOUS, MatchedDetections

RECALLS = np.linspace(0, 1, 101)
# Indices of IoU 0.50, 0.75 and 0.90 in 0.50, 0.55, ...
ROWS = {"AP50": 0, "AP75": 5, "AP90": 8}
CHUNK_ELEMENTS = 2**22
BOOTSTRAP_ROUNDS = 300
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A difference of two metrics in percent points, and its distribution over resamples.

    Attributes:
        value: on the images themselves.
        deviation: standard deviation over the resamples.
        low: lower end of the percentile interval of ``CONFIDENCE``.
        high: upper end.
    """

    value: float
    deviation: float
    low: float
    high: float


def average_precision(matched: MatchedDetections) -> dict[str, float]:
    """AP, AP50, AP75 and AP90 in percent, as pycocotools computes them; nan without objects."""
    metrics = average_precisions(matched, np.ones((1, len(matched.image_ids))))
    return {name: float(values[0]) for name, values in metrics.items()}


def average_precisions(
    matched: MatchedDetections, weights: npt.NDArray[np.float64]
) -> dict[str, npt.NDArray[np.float64]]:
    """``average_precision`` for several sets of image weights.

    Args:
        matched: see ``ImageMatcher``.
        weights: ``[B, I]`` whole numbers of copies of each image, 0 or more.

    Returns:
        float64 ``[B]`` by name.
    """
    objects = weights @ matched.objects  # [B, K]
    per_class = np.zeros((len(weights), len(IOUS), objects.shape[1]))
    by_score = np.argsort(-matched.scores, kind="stable")
    for index in np.unique(matched.classes).tolist():
        order = by_score[matched.classes[by_score] == index]
        for rounds in _chunks(len(weights), len(order)):
            per_class[rounds, :, index] = _class_precisions(
                weights[rounds][:, matched.images[order]],
                matched.hits[:, order],
                matched.ignored[:, order],
                objects[rounds, index],
            )
    return _mean_over_classes(per_class, objects > 0)


def paired_bootstrap(
    a: MatchedDetections, b: MatchedDetections, *, rounds: int = BOOTSTRAP_ROUNDS
) -> dict[str, Difference]:
    """The difference ``b - a``, on the same resamples of the images for both.

    Args:
        a: matched detections of one detector.
        b: matched detections of another one on the same images.
        rounds: number of resamples.

    Returns:
        The differences of AP, AP50, AP75 and AP90.
    """
    once = np.ones(len(a.image_ids))
    weights = np.concatenate([once[None], resamples(once, rounds)])
    before, after = average_precisions(a, weights), average_precisions(b, weights)
    changes = {name: after[name] - before[name] for name in before}
    return {name: difference(float(values[0]), values[1:]) for name, values in changes.items()}


def resamples(images: npt.NDArray[np.float64], rounds: int) -> npt.NDArray[np.float64]:
    """How often each image is drawn, ``[B, I]``, from images with repetitions.

    Args:
        images: ``[I]``, which to draw from, and as many: 1, or 0 for one that is left out.
        rounds: B.
    """
    count = int(images.sum())
    drawn = np.random.default_rng(0).multinomial(count, images / count, rounds)
    return drawn.astype(np.float64)


def difference(value: float, resampled: npt.NDArray[np.float64]) -> Difference:
    """A value with its distribution over resamples; those without objects, which are nan, are out.

    Without any others, deviation and interval are nan.

    Args:
        value: of the images themselves.
        resampled: ``[B]``.
    """
    values = resampled[~np.isnan(resampled)]
    if not len(values):
        return Difference(value, np.nan, np.nan, np.nan)
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Difference(
        value=value, deviation=float(values.std(ddof=1)), low=float(low), high=float(high)
    )


def _class_precisions(
    weights: npt.NDArray[np.float64],
    hits: npt.NDArray[np.bool_],
    ignored: npt.NDArray[np.bool_],
    objects: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Average precision ``[B, T]`` of one class.

    Args:
        weights: ``[B, D]``, of each detection's image, best score first.
        hits: ``[T, D]``.
        ignored: ``[T, D]``.
        objects: ``[B]``, weighted numbers of objects.
    """
    counted = weights.cumsum(axis=1)
    result = np.zeros((len(weights), len(hits)))
    for row in range(len(hits)):
        # Precision peaks at hits, so they alone decide the precision at the 101 recalls.
        columns = np.flatnonzero(hits[row])
        if len(columns) == 0:
            continue
        found = weights[:, columns].cumsum(axis=1)
        above = counted[:, columns]
        if ignored[row].any():
            above = above - (weights * ignored[row]).cumsum(axis=1)[:, columns]
        result[:, row] = _interpolated(found, above, objects)
    return result


def _interpolated(
    found: npt.NDArray[np.float64], above: npt.NDArray[np.float64], objects: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Mean over 101 recalls of the best precision at that recall or a higher one, ``[B]``.

    Args:
        found: ``[B, P]``, hits up to each hit.
        above: ``[B, P]``, detections up to each hit.
        objects: ``[B]``.
    """
    recall = found / np.maximum(objects, 1)[:, None]
    precision = found / (above + np.spacing(1))  # pycocotools guards its division like this.
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    reached = np.searchsorted(RECALLS, recall, side="right")  # How many of the 101 recalls.
    return (np.diff(reached, axis=1, prepend=0) * best).sum(axis=1) / len(RECALLS)


def _mean_over_classes(
    per_class: npt.NDArray[np.float64], present: npt.NDArray[np.bool_]
) -> dict[str, npt.NDArray[np.float64]]:
    counts = present.sum(axis=1)
    totals = (per_class * present[:, None]).sum(axis=2)  # [B, T]
    means = 100 * np.divide(
        totals, counts[:, None], out=np.full_like(totals, np.nan), where=counts[:, None] > 0
    )
    return {"AP": means.mean(axis=1), **{name: means[:, row] for name, row in ROWS.items()}}


def _chunks(rounds: int, detections: int) -> Iterator[slice]:
    # So that the weights of one class take some tens of megabytes.
    size = max(1, CHUNK_ELEMENTS // max(detections, 1))
    for start in range(0, rounds, size):
        yield slice(start, start + size)
