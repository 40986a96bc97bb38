"""Detections that a test writes down, and IoU from its definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cascade_det.core.structures import Detections


def detections_of(*rows: tuple) -> Detections:
    """Detections of rows of (XYWH box, score, class[, exit stage])."""
    boxes = torch.tensor([row[0] for row in rows], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Detections(
        boxes,
        torch.tensor([row[1] for row in rows], dtype=torch.float32),
        torch.tensor([row[2] for row in rows], dtype=torch.int64),
        torch.tensor([row[3] if len(row) > 3 else 0 for row in rows], dtype=torch.int64),
    )


def plain_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two XYXY boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)
