"""The loss of the tile head: it learns where the full cascade's detections come from.

Shapes: N images, R_i proposals of an image, a finest map of P x Q tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade_det.core.exits.tile_head import TileHead
from cascade_det.core.record import CascadeRecord


@dataclass
class TileOrigins:
    """Where proposals come from, and what the tile head sees of it.

    Attributes:
        hidden: ``[N, C, H, W]``, the RPN's hidden map of the level after the finest.
        tiles: per image int64 ``[R_i]``, the tile of the cell whose anchor became the proposal, row
            by row; -1 for proposals of coarser maps.
    """

    hidden: Tensor
    tiles: Sequence[Tensor]


def tile_loss(head: TileHead, record: CascadeRecord, origins: TileOrigins) -> Tensor:
    """Binary cross-entropy to ``needed_tiles``, the mean over all tiles.

    Of these there are few, so they weigh sqrt(others / needed) times as much.

    Args:
        head: gets the gradients.
        record: of the full cascade on all proposals.
        origins: of the same proposals.
    """
    logits = head(origins.hidden.detach())  # [N, P, Q]
    needed = needed_tiles(record, origins.tiles, logits.shape).float()
    count = needed.sum()
    weight = ((needed.numel() - count) / count.clamp(min=1)).sqrt()
    return F.binary_cross_entropy_with_logits(logits, needed, pos_weight=weight)


@torch.no_grad()
def needed_tiles(record: CascadeRecord, tiles: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """The tiles that detections of the full cascade come from.

    Args:
        record: of the full cascade on all proposals.
        tiles: of the same proposals, see ``TileOrigins``.
        shape: ``(N, P, Q)``.

    Returns:
        Bool ``[N, P, Q]``.
    """
    images, rows, columns = shape
    origin = torch.cat([*tiles])  # [R]
    needed = torch.zeros(images, rows * columns, dtype=torch.bool, device=origin.device)
    for image, found in enumerate(record.select(record.replay(None).reported)):
        own = origin[found.rows]
        needed[image, own[own >= 0]] = True
    return needed.view(images, rows, columns)
