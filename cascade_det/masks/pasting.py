"""Pastes the masks of a mask head into an image; needs no PyTorch.

The M x M cells of a mask divide its box. A pixel of the image has the bilinear interpolation of
the cells around its centre, and cells outside the box are 0: what Detectron2's
``paste_masks_in_image`` computes by ``grid_sample`` with ``align_corners=False``. The
interpolation is separable, so a box takes two small matrix products.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Masks = npt.NDArray[np.float32]
Bits = npt.NDArray[np.bool_]

THRESHOLD = 0.5


def paste_masks(masks: Masks, boxes: npt.NDArray[np.float32], height: int, width: int) -> Bits:
    """Paste masks into an image.

    Args:
        masks: float32 ``[D, M, M]`` in [0, 1].
        boxes: float32 ``[D, 4]``, XYXY in absolute pixels of the image.
        height: of the image in pixels.
        width: of the image in pixels.

    Returns:
        Bool ``[D, height, width]``.
    """
    pasted = np.zeros((len(masks), height, width), np.bool_)
    for image, mask, box in zip(pasted, masks, boxes, strict=True):
        top, left, bits = paste_in_box(mask, box, height, width)
        image[top : top + bits.shape[0], left : left + bits.shape[1]] = bits
    return pasted


def paste_in_box(
    mask: Masks, box: npt.NDArray[np.float32], height: int, width: int
) -> tuple[int, int, Bits]:
    """Paste one mask into the part of an image that its box covers.

    Args:
        mask: float32 ``[M, M]``.
        box: float32 ``[4]``.
        height: of the image in pixels.
        width: of the image in pixels.

    Returns:
        First row and column of that part, and bool ``[h, w]``, its pixels.
    """
    left, across = _interpolation(box[0], box[2], width, mask.shape[1])
    top, down = _interpolation(box[1], box[3], height, mask.shape[0])
    return top, left, down @ mask @ across.T >= THRESHOLD


def _interpolation(
    low: np.float32, high: np.float32, length: int, cells: int
) -> tuple[int, npt.NDArray[np.float32]]:
    """The pixels between two edges along one axis.

    Args:
        low: lower edge of the box in pixels.
        high: upper edge.
        length: pixels of the image.
        cells: M.

    Returns:
        The first pixel, and float32 ``[pixels, M]``, the weights of the cells for each.
    """
    one = np.float32(1)
    first = int(np.clip(np.floor(low) - one, 0, length))
    last = int(np.clip(np.ceil(high) + one, first, length))
    pixels = np.arange(first, last, dtype=np.float32)
    if high <= low:
        return first, np.zeros((len(pixels), cells), np.float32)
    # Rounds as grid_sample does: to [-1, 1], and from there to cells.
    at = (pixels + np.float32(0.5) - low) / (high - low) * np.float32(2) - one
    at = ((at + one) * np.float32(cells) - one) / np.float32(2)
    weights = one - np.abs(at[:, None] - np.arange(cells, dtype=np.float32))
    return first, np.maximum(weights, 0)
