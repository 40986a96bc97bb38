"""Detections in COCO's result format, with masks; needs no PyTorch."""

from __future__ import annotations

from typing import Any

from cascade_det.detection_formats import EncodedMasks, as_array, coco_results
from cascade_det.masks.rle import encode_pasted

__all__ = ["EncodedMasks", "coco_results", "encode_masks"]


def encode_masks(detections: Any, height: int, width: int) -> EncodedMasks:
    """The masks of an image's detections as RLE; ``None`` for a detector without masks.

    Args:
        detections: ``Detections`` or ``ArrayDetections``.
        height: of the image in pixels.
        width: of the image in pixels.
    """
    if detections.masks is None:
        return None
    return encode_pasted(as_array(detections.masks), as_array(detections.boxes), height, width)
