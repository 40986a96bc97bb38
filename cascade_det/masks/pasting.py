"""Pastes the masks of a mask head into an image; needs no PyTorch.

The M x M cells of a mask divide its box. A pixel of the image has the bilinear interpolation of
the cells around its centre, cells outside the box are 0, and it belongs to the mask from 0.5 on:
what Detectron2's ``paste_masks_in_image`` computes by ``grid_sample`` with
``align_corners=False``. Down a column of pixels that is linear between two cells, so a mask is
found from the few places where a column crosses 0.5, whatever the number of its pixels.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Masks = npt.NDArray[np.float32]
Boxes = npt.NDArray[np.float32]
Bits = npt.NDArray[np.bool_]
Positions = npt.NDArray[np.int64]

THRESHOLD = 0.5


def paste_masks(masks: Masks, boxes: Boxes, height: int, width: int) -> Bits:
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


def paste_in_box(mask: Masks, box: Boxes, height: int, width: int) -> tuple[int, int, Bits]:
    """Paste one mask into the part of an image that its box covers.

    Args:
        mask: float32 ``[M, M]``.
        box: float32 ``[4]``.
        height: of the image in pixels.
        width: of the image in pixels.

    Returns:
        First row and column of that part, and bool ``[h, w]``, its pixels.
    """
    left, right = _pixels(box[0], box[2], width)
    top, bottom = _pixels(box[1], box[3], height)
    columns, rows = mask_edges(mask, box, height, width)
    changes = np.zeros((bottom - top + 1, right - left), np.uint8)
    np.bitwise_xor.at(changes, (rows - top, columns - left), 1)
    bits = np.bitwise_xor.accumulate(changes, axis=0)[:-1]
    return top, left, bits.view(np.bool_)


def mask_edges(mask: Masks, box: Boxes, height: int, width: int) -> tuple[Positions, Positions]:
    """Where the columns of a pasted mask begin and end.

    Args:
        mask: float32 ``[M, M]``.
        box: float32 ``[4]``.
        height: of the image in pixels.
        width: of the image in pixels.

    Returns:
        Column int64 ``[E]`` and row int64 ``[E]``, ordered by column. From this row on, the pixels
        of the column are inside where they were outside before, or the reverse. Rows are at most
        ``height``; changes at the same place cancel each other in pairs.
    """
    left, right = _pixels(box[0], box[2], width)
    top, bottom = _pixels(box[1], box[3], height)
    x, y = box[:2].astype(np.float64)
    across, down = (box[2:].astype(np.float64) - (x, y)) / mask.shape  # pixels of a cell
    if left == right or top == bottom or across <= 0 or down <= 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    padded = np.zeros((len(mask) + 2, len(mask) + 2), mask.dtype)
    padded[1:-1, 1:-1] = mask.T  # column by column
    at = (np.arange(left, right) + 0.5 - x) / across + 0.5  # in padded cells
    at = np.clip(at, 0, len(mask) + 1)
    cells = np.minimum(at.astype(np.int64), len(mask))
    part = (at - cells)[:, None]
    profiles = padded[cells] * (1 - part) + padded[cells + 1] * part  # [w, M + 2]
    inside = profiles >= THRESHOLD
    columns, cells = np.nonzero(inside[:, 1:] != inside[:, :-1])
    before, after = profiles[columns, cells], profiles[columns, cells + 1]
    crossings = cells - 0.5 + (THRESHOLD - before) / (after - before)
    crossings = crossings * down + y - 0.5  # pixels with their centre at 0, 1, ...
    rows = np.where(after > before, np.ceil(crossings), np.floor(crossings) + 1)
    return columns + left, np.clip(rows, top, bottom).astype(np.int64)


def _pixels(low: np.float32, high: np.float32, length: int) -> tuple[int, int]:
    """First pixel and end of the pixels that a box touches along one axis."""
    first = min(max(math.floor(low), 0), length)
    return first, min(max(math.ceil(high), first), length)
