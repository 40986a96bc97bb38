"""Differences between the detections of two models on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torchvision.ops import box_iou

from cascade_det.core import Detections

_MATCH_IOU = 0.9


def compare_detections(own: Sequence[Detections], other: Sequence[Detections]) -> dict[str, Any]:
    """Compare two models' detections of the same images.

    Two detections match if they have the same class, an IoU of 0.9 or more, and overlap each
    other more than any other detection.

    Args:
        own: one entry per image.
        other: one entry per image.

    Returns:
        ``detections`` and ``of_the_other``, the numbers of detections; ``in_common``, the number
        of matches; ``box_difference`` (pixels) and ``score_difference``, the largest among the
        matches, 0 without any.
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
