"""Metrics of segmented images for any weights of them, and the bootstrap of their differences.

I images, G groups of them (the slices of a volume, or single images), K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cascade_det.calibration.bootstrap import BOOTSTRAP_ROUNDS, CONFIDENCE, Difference

METRICS = ("mIoU", "Dice")
Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Scorer:
    """Scores the confusion matrices of images.

    Args:
        groups: int64 ``[I]``, the group of each image: 0 to G - 1, each with an image.
        metric: ``mIoU`` over all pixels, see ``evaluation.semantic``; or ``Dice``, the mean over
            groups and over the classes in their truth, without class 0.

    Raises:
        ValueError: an unknown metric.
    """

    def __init__(self, groups: Sequence[int], metric: str) -> None:
        if metric not in METRICS:
            raise ValueError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}")
        self.groups = np.asarray(groups, np.int64)
        self.metric = metric

    @property
    def num_groups(self) -> int:
        """G."""
        return int(self.groups.max()) + 1

    def of_groups(self, values: Floats) -> Floats:
        """The mean over the images of each group: ``[I]`` to ``[G]``."""
        sizes = np.bincount(self.groups)
        return np.asarray(np.bincount(self.groups, values) / sizes)

    def score(self, counts: Counts) -> float:
        """The metric in percent of matrices ``[I, K, K]``; nan without truth."""
        return float(self._scores(counts, np.ones((1, self.num_groups)))[0])

    def difference(
        self, before: Counts, after: Counts, *, rounds: int = BOOTSTRAP_ROUNDS
    ) -> Difference:
        """``after - before`` in percent points, on resamples of the groups, the same for both."""
        weights = resamples(self.num_groups, rounds)
        values = self._scores(after, weights) - self._scores(before, weights)
        resampled = values[1:][~np.isnan(values[1:])]
        if len(resampled) < 2:
            return Difference(float(values[0]), *[float("nan")] * 3)
        low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return Difference(float(values[0]), float(resampled.std(ddof=1)), float(low), float(high))

    def ratio(self, numerators: Floats, denominators: Floats) -> Difference:
        """The ratio of two sums over the same images ``[I]``, on resamples of the groups."""
        weights = resamples(self.num_groups)
        above, below = (np.bincount(self.groups, x) for x in (numerators, denominators))
        values = (weights @ above) / (weights @ below)
        low, high = np.quantile(values[1:], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return Difference(float(values[0]), float(values[1:].std(ddof=1)), float(low), float(high))

    def _scores(self, counts: Counts, weights: Floats) -> Floats:
        """``[W]`` for weights of groups ``[W, G]``."""
        of_groups = np.zeros((self.num_groups, *counts.shape[1:]))
        np.add.at(of_groups, self.groups, counts)
        if self.metric == "Dice":
            return self._dice(of_groups, weights)
        sums = (weights @ of_groups.reshape(len(of_groups), -1)).reshape(-1, *counts.shape[1:])
        right, true = sums.diagonal(axis1=1, axis2=2), sums.sum(2)
        union = true + sums.sum(1) - right
        iou = np.divide(right, union, out=np.zeros_like(right), where=true > 0)
        return _mean(iou.sum(1), (true > 0).sum(1))

    @staticmethod
    def _dice(of_groups: Floats, weights: Floats) -> Floats:
        right, true = of_groups.diagonal(axis1=1, axis2=2)[:, 1:], of_groups.sum(2)[:, 1:]
        sizes = true + of_groups.sum(1)[:, 1:]
        dice = np.divide(2 * right, sizes, out=np.zeros_like(right), where=true > 0)
        return _mean(weights @ dice.sum(1), weights @ (true > 0).sum(1))


def resamples(count: int, rounds: int = BOOTSTRAP_ROUNDS) -> Floats:
    """Weights ``[1 + rounds, count]``: all ones, then resamples (Efron 1979), always the same."""
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), rounds)
    return np.concatenate([np.ones((1, count)), drawn])


def _mean(total: Floats, count: Floats) -> Floats:
    return 100 * np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
