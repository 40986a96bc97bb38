"""Detections that a test writes down."""

from __future__ import annotations

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
