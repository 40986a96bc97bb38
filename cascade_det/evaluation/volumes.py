"""Overlap and surface distance of segmented volumes: Dice, Jaccard, HD95, ASSD per class.

A mask is bool of any number of axes; volumes are labels ``[D, H, W]``. The surface of a mask is its
elements with a face neighbour outside; everything beyond the array is outside. Distances are
Euclidean, between centres of elements: from each surface element of a mask to the nearest one of
the other, in both directions. HD95 is the 95th percentile of the two lists joined, ASSD their mean.
Definitions are those of MedPy 0.5.2, the library of the published evaluations of Synapse and ACDC
(TransUNet, CASCADE, MERIT); its older releases took the mean of the lists' means as ASSD.

Where a mask is empty there is no distance, and two conventions:

| truth | prediction | published | strict |
|---|---|---|---|
| empty | empty | Dice 0, distances 0 | not counted: nan |
| present | empty (a miss) | Dice 0, distances 0 | Dice 0, distances the diagonal of the volume |
| empty | present | Dice 1, distances 0 | Dice 0, distances the diagonal of the volume |

Jaccard is treated like Dice. By the published convention, a missed organ improves the mean HD95.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Mask = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.integer[Any]]
Box = tuple[slice, ...]


class Scores(NamedTuple):
    """Of two masks; distances in elements, or in the unit of the spacing."""

    dice: float
    hd95: float
    jaccard: float
    assd: float


class Comparison(NamedTuple):
    """Two masks, compared.

    Attributes:
        in_prediction: whether the predicted mask has an element.
        in_truth: whether the true mask has one.
        scores: ``None`` if either is empty.
        diagonal: of the whole array, in the unit of the distances.
    """

    in_prediction: bool
    in_truth: bool
    scores: Scores | None
    diagonal: float

    def published(self) -> Scores:
        """The scores by the published convention, see above."""
        if self.scores is not None:
            return self.scores
        overlap = float(self.in_prediction)
        return Scores(overlap, 0.0, overlap, 0.0)

    def strict(self) -> Scores:
        """The scores by the strict convention, see above; all nan if both masks are empty."""
        if self.scores is not None:
            return self.scores
        if not self.in_prediction and not self.in_truth:
            return Scores(*[float("nan")] * 4)
        return Scores(0.0, self.diagonal, 0.0, self.diagonal)


def compare_masks(
    prediction: Mask, truth: Mask, *, spacing: Sequence[float] | None = None
) -> Comparison:
    """Compare two masks.

    Args:
        prediction: bool, of any number of axes.
        truth: bool, of the same shape.
        spacing: size of an element along each axis, in mm for example; ``None`` is 1, as in the
            published evaluations.

    Raises:
        ValueError: the shapes differ, or the spacing does not fit them.
    """
    pair = prediction.view(np.uint8), truth.view(np.uint8)
    return compare_volumes(*pair, 2, spacing=spacing)[0]


def compare_volumes(
    prediction: Labels, truth: Labels, num_classes: int, *, spacing: Sequence[float] | None = None
) -> list[Comparison]:
    """Compare two label volumes class by class, without the background.

    Args:
        prediction: integers ``[D, H, W]`` in ``0..K-1``; 0 is the background.
        truth: integers ``[D, H, W]``, of the same classes; other labels, such as 255, of none.
        num_classes: K, at least 2.
        spacing: size of a voxel along each axis, see ``compare_masks``.

    Returns:
        K - 1 comparisons, of the classes from 1 on.

    Raises:
        ValueError: the shapes differ, or the spacing does not fit them.
    """
    if prediction.shape != truth.shape:
        raise ValueError(
            f"the prediction has the shape {prediction.shape}, the truth {truth.shape}"
        )
    if spacing is not None and (len(spacing) != truth.ndim or min(spacing) <= 0):
        raise ValueError(
            f"spacing {tuple(spacing)}: expected {truth.ndim} sizes above 0, one per axis"
        )
    sides = np.multiply(truth.shape, 1.0 if spacing is None else spacing)
    diagonal = float(np.linalg.norm(sides))
    # One pass over each volume finds the boxes; the work of a class is then that of its boxes.
    boxes = (ndimage.find_objects(labels, num_classes - 1) for labels in (prediction, truth))
    comparisons = []
    for label, (predicted, true) in enumerate(zip(*boxes, strict=True), start=1):
        scores = None
        if predicted is not None and true is not None:
            # Exact: both surfaces lie in the box, and beyond it both masks are empty.
            box = _union(predicted, true)
            scores = _scores(prediction[box] == label, truth[box] == label, spacing)
        found = predicted is not None, true is not None
        comparisons.append(Comparison(*found, scores, diagonal))
    return comparisons


def _union(first: Box, second: Box) -> Box:
    return tuple(
        slice(min(a.start, b.start), max(a.stop, b.stop))
        for a, b in zip(first, second, strict=True)
    )


def _scores(predicted: Mask, true: Mask, spacing: Sequence[float] | None) -> Scores:
    """Scores of two masks that are not empty."""
    common = int(np.count_nonzero(predicted & true))
    total = int(np.count_nonzero(predicted)) + int(np.count_nonzero(true))
    surfaces = _surface(predicted), _surface(true)
    there = _distances(*surfaces, spacing)
    back = _distances(*surfaces[::-1], spacing)
    distances = np.concatenate([there, back])
    return Scores(
        dice=2 * common / total,
        hd95=float(np.percentile(distances, 95)),
        jaccard=common / (total - common),
        assd=float(distances.mean()),
    )


def _surface(mask: Mask) -> Mask:
    surface: Mask = mask & ~ndimage.binary_erosion(mask)
    return surface


def _distances(start: Mask, end: Mask, spacing: Sequence[float] | None) -> npt.NDArray[np.float64]:
    """From each element of one mask to the nearest of another, which is not empty."""
    nearest = ndimage.distance_transform_edt(
        ~end, sampling=spacing, return_distances=False, return_indices=True
    )
    # Only those of the surface: distances everywhere would take most of the time and memory.
    offsets = (nearest[:, start] - np.nonzero(start)).astype(np.float64)  # [axes, S]
    if spacing is not None:
        offsets *= np.asarray(spacing, np.float64)[:, None]
    return np.sqrt(np.square(offsets).sum(0))
