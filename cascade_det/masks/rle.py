"""COCO's run-length encoding (RLE) of masks; needs no PyTorch.

Compressed, it is ``{"size": [height, width], "counts": str}``. The counts are the lengths of runs
down the columns, of pixels outside and inside by turns, and add up to the pixels of the image.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from cascade_det.masks.pasting import Boxes, Masks, mask_edges

Rle = dict[str, Any]

# Digits of 5 bits, the lowest first; from 32 on, more digits follow. Seven hold any run.
_FIRST_CHARACTER = ord("0")
_NUMBERS = re.compile(r"(?:[P-o]{0,6}[0-O])+")
# pycocotools has memory for six when it writes a run; Pillow opens no image as large.
_MOST_PIXELS = 2**28


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
        For each detection its RLE, or ``None`` if it has no mask (all of its cells are 0).
    """
    return [
        _encode(mask, box, height, width) if mask.any() else None
        for mask, box in zip(masks, boxes, strict=True)
    ]


def compressed(value: Any, height: int, width: int) -> Rle:
    """Untrusted RLE as compressed RLE that is safe for pycocotools, which checks nothing itself.

    Args:
        value: of a json; ``counts`` is a text, or a list of run lengths.
        height: of the image in pixels.
        width: of the image in pixels.

    Raises:
        ValueError: it is not RLE of such an image; the message completes "its RLE ...".
    """
    if not isinstance(value, dict) or not {"size", "counts"} <= value.keys():
        raise ValueError("is not an object with 'size' and 'counts'")
    size, counts = value["size"], value["counts"]
    if not isinstance(size, list) or [*map(type, size)] != [int, int]:
        raise ValueError("has a 'size' that is not [height, width]")
    if size != [height, width]:
        raise ValueError("has another 'size' than its image, [height, width]")
    if height * width > _MOST_PIXELS:
        raise ValueError("is of an image with too many pixels")
    if isinstance(counts, str):
        runs = _runs(counts)
    elif isinstance(counts, list) and counts and all(type(run) is int for run in counts):
        runs = counts
    else:
        raise ValueError("has 'counts' that are neither a text nor a list of integers")
    if min(runs) < 0 or sum(runs) != height * width:
        raise ValueError("has 'counts' that do not add up to the pixels of its image")
    if isinstance(counts, str):
        return {"size": size, "counts": counts}
    return _compress(runs, height, width)


def _encode(mask: Masks, box: Boxes, height: int, width: int) -> Rle:
    columns, rows = mask_edges(mask, box, height, width)
    # A column that ends at the lower border goes on at the top of the next one.
    positions, times = np.unique(columns * height + rows, return_counts=True)
    changes = positions[(times % 2 == 1) & (positions < height * width)]
    ends = np.append(changes, height * width)
    ends[1:] -= changes
    return _compress(ends, height, width)


def _compress(runs: Sequence[int] | npt.NDArray[np.int64], height: int, width: int) -> Rle:
    (rle,) = coco_mask.frPyObjects([{"size": [height, width], "counts": runs}], height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def _runs(counts: str) -> list[int]:
    """The run lengths of a compressed RLE, some maybe negative.

    Raises:
        ValueError: it is not a text that pycocotools writes.
    """
    if not _NUMBERS.fullmatch(counts):
        raise ValueError("has 'counts' that are not compressed run lengths")
    digits = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - _FIRST_CHARACTER
    is_last = digits < 32
    ends = np.flatnonzero(is_last) + 1
    starts = np.concatenate([[0], ends[:-1]])
    lengths = ends - starts
    places = 5 * (np.arange(len(digits)) - np.repeat(starts, lengths))
    numbers = np.add.reduceat((digits & 31) << places, starts)
    numbers -= (digits[is_last] & 16) << (5 * lengths - 4)  # two's complement
    # From the fourth on, each is the difference to the one before the last.
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    runs: list[int] = numbers.tolist()
    return runs
