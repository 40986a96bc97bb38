"""How far the detections of one contender are from those of another on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torchvision.ops import box_iou

from cascade_det.core import Detections

_MATCH_IOU = 0.9


def compare_detections(own: Sequence[Detections], other: Sequence[Detections]) -> dict[str, Any]:
    """Detections of the same images side by side.

    Two belong together that have the same class and each other as the box that overlaps most,
    by an IoU of 0.9 or more.

    Returns:
        ``detections`` and ``of_the_other``, how many there are; ``in_common``, how many belong
        together; and the largest differences among these, ``box_difference`` in pixels and
        ``score_difference``, 0 where there are none.
    """
    common = 0
    boxes = scores = 0.0
    for mine, theirs in zip(own, other, strict=True):
        mine, theirs = mine.to("cpu"), theirs.to("cpu")
        if not len(mine) or not len(theirs):
            continue
        overlaps = box_iou(mine.boxes.float(), theirs.boxes.float())
        overlaps *= mine.classes[:, None] == theirs.classes
        best, index = overlaps.max(dim=1)
        back = overlaps.argmax(dim=0)
        rows = torch.arange(len(mine))
        rows = rows[(best >= _MATCH_IOU) & (back[index] == rows)]
        if not len(rows):
            continue
        common += len(rows)
        matched = theirs[index[rows]]
        boxes = max(boxes, (mine.boxes[rows] - matched.boxes).abs().max().item())
        scores = max(scores, (mine.scores[rows] - matched.scores).abs().max().item())
    return {
        "detections": sum(map(len, own)),
        "of_the_other": sum(map(len, other)),
        "in_common": common,
        "box_difference": boxes,
        "score_difference": scores,
    }
