"""Repeat factors: how often an epoch shows each image, more often those with rare classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Factors = npt.NDArray[np.float32]


def repeat_factors(
    classes: Sequence[npt.NDArray[np.int64]], threshold: float, *, square_root: bool = True
) -> Factors:
    """Factors by the rarest class of each image (LVIS, arXiv 1908.03195, appendix B).

    The frequency f(c) of a class is the share of the images that have it, and its factor
    r(c) = max(1, sqrt(threshold / f(c))). The factor of an image is the largest of its classes,
    1 without objects. These are the numbers of Detectron2's ``RepeatFactorTrainingSampler``.

    Args:
        classes: of the objects of each of N images; crowds count, as in Detectron2.
        threshold: classes in fewer images than this share are repeated.
        square_root: whether to take the root; without it a class of half the threshold is seen
            twice as often.

    Returns:
        float32 ``[N]``, 1 or more.
    """
    present = [np.unique(own) for own in classes]
    counts = np.bincount(np.concatenate([*present, np.empty(0, np.int64)]))
    ratios = threshold / (np.maximum(counts, 1) / max(len(classes), 1))
    factors = np.maximum(np.sqrt(ratios) if square_root else ratios, 1.0)  # [K]
    return np.array([factors[own].max(initial=1.0) for own in present], dtype=np.float32)


def repeated(factors: Factors, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """The images of an epoch, ascending: image i as often as its factor says on average.

    The fraction of a factor is the probability of one more time.
    """
    whole = np.floor(factors)
    more = generator.random(len(factors)) < factors - whole
    return np.repeat(np.arange(len(factors)), whole.astype(np.int64) + more)
