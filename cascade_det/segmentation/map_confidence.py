"""How sure a map of class scores is: per pixel, per image and per square patch.

Shapes: N images, K classes, ``[H, W]`` pixels of the scores.
"""

from __future__ import annotations

from math import log

import torch
from torch import Tensor
from torch.nn import functional as F

MEASURES = ("max", "quantile", "entropy")
QUANTILE = 0.25  # of the pixels, least sure first


def pixel_confidence(logits: Tensor, measure: str) -> Tensor:
    """How sure each pixel is, 0 to 1; NaN where a score is not finite.

    Args:
        logits: ``[N, K, H, W]`` of two or more classes.
        measure: ``entropy``, 1 less the entropy over its maximum log K; else the largest
            probability.

    Returns:
        ``[N, H, W]``.

    Raises:
        ValueError: one class, or an unknown measure.
    """
    if measure not in MEASURES:
        raise ValueError(f"unknown confidence {measure!r}; known: {', '.join(MEASURES)}")
    if logits.shape[1] < 2:
        raise ValueError("confidence needs two classes or more: one has nothing to confuse")
    if measure == "entropy":
        logs = logits.log_softmax(1)
        return 1 + (logs.exp() * logs).sum(1) / log(logits.shape[1])
    return (logits.amax(1) - logits.logsumexp(1)).exp()


def image_confidence(logits: Tensor, measure: str) -> Tensor:
    """``[N]``: of ``quantile`` the 0.25 quantile of the pixels of an image, else their mean.

    Raises:
        ValueError: one class, or an unknown measure.
    """
    return _reduce(pixel_confidence(logits, measure).flatten(1), measure)


def patch_confidence(logits: Tensor, measure: str, *, size: tuple[int, int], patch: int) -> Tensor:
    """As ``image_confidence``, of square patches of a finer grid.

    Args:
        logits: ``[N, K, H, W]``.
        measure: see ``pixel_confidence``.
        size: of the finer grid, whose pixels get the value of the nearest one here.
        patch: side in pixels of the finer grid. In a patch that its border cuts, the last row and
            column count as often as they would have to fill it.

    Returns:
        ``[N, ceil(size[0] / patch), ceil(size[1] / patch)]``.

    Raises:
        ValueError: one class, or an unknown measure.
    """
    pixels = F.interpolate(pixel_confidence(logits, measure)[:, None], size, mode="nearest")
    rows, columns = (-(-side // patch) for side in size)
    missing = (0, columns * patch - size[1], 0, rows * patch - size[0])
    pixels = F.pad(pixels, missing, mode="replicate")
    tiles = pixels.view(-1, rows, patch, columns, patch).transpose(2, 3)
    return _reduce(tiles.flatten(3), measure)  # [N, rows, columns, patch^2]


def _reduce(pixels: Tensor, measure: str) -> Tensor:
    return torch.quantile(pixels, QUANTILE, dim=-1) if measure == "quantile" else pixels.mean(-1)
