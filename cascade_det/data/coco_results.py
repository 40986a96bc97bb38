"""Detections in COCO's result format, with masks; needs no PyTorch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pycocotools import mask as coco_mask

from cascade_det.detection_formats import EncodedMasks, as_array, coco_results
from cascade_det.masks.rle import encode_pasted

# What predict writes into its folder.
PREDICTIONS_FILE = "predictions.json"

__all__ = ["PREDICTIONS_FILE", "EncodedMasks", "coco_results", "encode_masks"]


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


def area_of(entry: Mapping[str, Any]) -> float:
    """The area of a result in pixels: of its mask or, without one, of its box."""
    if "segmentation" in entry:
        return float(coco_mask.area(entry["segmentation"]))
    _, _, width, height = entry["bbox"]
    area: float = width * height
    return area


def json_items(items: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The items between the brackets of a json list, piece by piece, each on a line."""
    for count, item in enumerate(items):
        yield f"{',' * (count > 0)}\n{json.dumps(item)}"
