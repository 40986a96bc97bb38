"""COCO's run-length encoding (RLE) of masks; needs no PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from cascade_det.masks.pasting import Boxes, Masks, mask_edges

Rle = dict[str, Any]


def encode_pasted(masks: Masks, boxes: Boxes, height: int, width: int) -> list[Rle | None]:
    """The masks of an image's detections in COCO's compressed RLE.

    It equals ``pycocotools.mask.encode`` of the pasted masks (see ``pasting.paste_masks``), but no
    pixel of them is ever in memory.

    Args:
        masks: float32 ``[D, M, M]`` in [0, 1].
        boxes: float32 ``[D, 4]``, XYXY in absolute pixels of the image.
        height: of the image in pixels.
        width: of the image in pixels.

    Returns:
        For each detection ``{"size": [height, width], "counts": str}``, or None if it has no mask
        (all of its cells are 0).
    """
    return [
        _encode(mask, box, height, width) if mask.any() else None
        for mask, box in zip(masks, boxes, strict=True)
    ]


def _encode(mask: Masks, box: Boxes, height: int, width: int) -> Rle:
    columns, rows = mask_edges(mask, box, height, width)
    # A column that ends at the lower border goes on at the top of the next one.
    positions, times = np.unique(columns * height + rows, return_counts=True)
    changes = positions[(times % 2 == 1) & (positions < height * width)]
    runs = np.diff(changes, prepend=0, append=height * width)
    (rle,) = coco_mask.frPyObjects([{"size": [height, width], "counts": runs}], height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}
