"""Tiles of a feature map over a picture: where it was computed, and where not; needs no PyTorch."""

from __future__ import annotations

from typing import Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from cascade_det.report.colors import BLUE, ORANGE, Color
from cascade_det.report.mask_drawing import line_width

_DARK: Color = (60, 60, 60)
_BRIGHTNESS = 0.35  # where nothing was computed
_TINT = 0.2
# What a legend says of them, in the order of their numbers in a grid.
TILE_KINDS = {
    "tiles not computed": _DARK,
    "computed for regions": BLUE,
    "open for the RPN": ORANGE,
}


class DrawableTiles(Protocol):
    """What is drawn of ``core.structures.ImageTiles``, as arrays or as tensors on the CPU.

    Attributes:
        opened: bool ``[P, Q]``.
        computed: bool ``[P, Q]``.
        height: of a tile in pixels of the picture.
        width: of a tile in pixels of the picture.
    """

    opened: Any
    computed: Any
    height: float
    width: float


def paint_tiles(picture: npt.NDArray[np.uint8], tiles: DrawableTiles) -> None:
    """Darken what was not computed; tint and outline the rest, in the colours of ``TILE_KINDS``.

    Args:
        picture: uint8 ``[H, W, 3]``, contiguous; changed. Tiles beyond it are left out.
        tiles: of this picture.
    """
    opened, computed = np.asarray(tiles.opened), np.asarray(tiles.computed)
    grid = np.where(opened, 2, np.where(computed, 1, 0)).astype(np.uint8)
    rows, columns = (
        np.minimum(np.arange(pixels) // side, count - 1).astype(np.int64)
        for pixels, side, count in zip(
            picture.shape[:2], (tiles.height, tiles.width), grid.shape, strict=True
        )
    )
    kinds = grid[rows[:, None], columns]  # [H, W]
    original = picture.copy()
    for kind, color in enumerate(TILE_KINDS.values()):
        inside = (kinds == kind).view(np.uint8)
        cv2.copyTo(cv2.LUT(original, _shaded(kind, color)), inside, picture)
    for kind, color in list(enumerate(TILE_KINDS.values()))[1:]:
        inside = (kinds == kind).view(np.uint8)
        found, _ = cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(picture, found, -1, color, line_width(picture))


def _shaded(kind: int, color: Color) -> npt.NDArray[np.uint8]:
    """``[1, 256, 3]``: what becomes of each value of a channel."""
    values = np.arange(256.0)[None, :, None]
    if kind == 0:
        mixed = np.broadcast_to(_BRIGHTNESS * values, (1, 256, 3))
    else:
        mixed = (1 - _TINT) * values + _TINT * np.array(color)
    return mixed.astype(np.uint8)
