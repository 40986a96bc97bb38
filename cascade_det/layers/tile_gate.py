"""Which tiles of the finest map are computed: by a score of each, and by regions.

Shapes: N images, P x Q tiles, R regions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade_det.layers.tiles import TILE, WHOLE_FROM_WITH_BORDER


def open_tiles(scores: Tensor, threshold: float) -> Tensor:
    """The tiles where the RPN reads the finest map: those whose score reaches the threshold.

    Where most tiles of an image would be open, all are, which is faster.

    Args:
        scores: ``[N, P, Q]`` in [0, 1].
        threshold: above 0; 1 opens none.

    Returns:
        Bool ``[N, P, Q]``.
    """
    if threshold >= 1:
        return torch.zeros_like(scores, dtype=torch.bool)
    is_open = scores >= threshold
    share = is_open.float().mean(dim=(1, 2), keepdim=True)  # [N, 1, 1]
    return is_open | (share >= WHOLE_FROM_WITH_BORDER)


def tile_scores(logits: Tensor) -> Tensor:
    """The highest objectness in and beside each tile: float32 ``[N, P, Q]``.

    It is that of the next coarser map. Those after it would open tiles of objects that are found
    there.

    Args:
        logits: ``[N, H, W]``, of the best anchor of each cell of the map of twice the stride.
    """
    side = TILE // 2  # cells of a tile
    return F.max_pool2d(logits[:, None], side + 2, stride=side, padding=1).squeeze(1).sigmoid()


def tiles_of_boxes(
    boxes: Tensor, images: Tensor, shape: Sequence[int], *, scale: float, aligned: bool
) -> Tensor:
    """The tiles that RoIAlign reads for some boxes.

    Args:
        boxes: float32 ``[R, 4]``, XYXY in absolute pixels; one with NaN reads the first cell.
        images: int64 ``[R]``, the image of each.
        shape: ``(N, P, Q)``.
        scale: cells per pixel.
        aligned: whether boxes are shifted by half a cell, see ``RoIPooler``.

    Returns:
        Bool ``[N, P, Q]``.
    """
    count, rows, columns = shape
    edges = boxes.nan_to_num(0.0) * scale - (0.5 if aligned else 0.0)
    low, high = edges[:, :2], edges[:, 2:]
    if not aligned:
        high = torch.maximum(high, low + 1)
    last = torch.tensor([columns, rows], device=boxes.device) - 1
    # The last sample is at `high` at most, between two cells; bins are filled up by one cell more.
    begin, end = (
        x.div(TILE).floor().clamp(min=0).minimum(last).to(torch.int64)
        for x in (low.floor(), (high + 1.5).floor())
    )
    # Samples outside of the map, or of empty boxes, count as 0, but read the first cell.
    outside = (low < -1) | (high > (last + 1) * TILE) | (high <= low)
    begin = begin.masked_fill(outside, 0)
    end = torch.maximum(begin, end) + 1
    # Corners of rectangles, whose sums over both axes are the rectangles.
    corners = torch.zeros(count, rows + 1, columns + 1, dtype=torch.int64, device=boxes.device)
    for y, x, sign in (
        (begin[:, 1], begin[:, 0], 1),
        (begin[:, 1], end[:, 0], -1),
        (end[:, 1], begin[:, 0], -1),
        (end[:, 1], end[:, 0], 1),
    ):
        corners.index_put_((images, y, x), torch.full_like(y, sign), accumulate=True)
    return corners.cumsum(1).cumsum(2)[:, :-1, :-1] > 0
