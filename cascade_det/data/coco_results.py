"""Detections in COCO's result format; needs no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_det.errors import DatasetError
from cascade_det.masks.rle import Rle, encode_pasted

EncodedMasks = Sequence[Rle | None] | None


def encode_masks(detections: Any, height: int, width: int) -> EncodedMasks:
    """The masks of an image's detections as RLE; ``None`` for a detector without masks.

    Args:
        detections: ``Detections`` or ``ArrayDetections``.
        height: of the image in pixels.
        width: of the image in pixels.
    """
    if detections.masks is None:
        return None
    return encode_pasted(_array(detections.masks), _array(detections.boxes), height, width)


def coco_results(
    detections: Any,
    image_id: int,
    category_ids: Sequence[int],
    masks: EncodedMasks = None,
) -> list[dict[str, Any]]:
    """Detections of one image in COCO's result format, plus ``exit_stage`` for each.

    Nothing is rounded: IoUs close to a threshold would cross it, and small scores that became equal
    would change order.

    Args:
        detections: ``Detections`` or ``ArrayDetections``.
        image_id: the id in the json.
        category_ids: of the classes ``0..K-1``.
        masks: see ``encode_masks``; a detection without a mask gets no ``segmentation``.

    Raises:
        DatasetError: a class index has no category.
    """
    classes = detections.classes.tolist()
    if classes and not 0 <= min(classes) <= max(classes) < len(category_ids):
        raise DatasetError(
            f"image {image_id}: detections have class indices {min(classes)} to {max(classes)}, "
            f"but the data set has {len(category_ids)} classes: set MODEL.ROI_HEADS.NUM_CLASSES "
            f"to {len(category_ids)} or evaluate on the data set that the model was trained for"
        )
    boxes = _array(detections.boxes).copy()
    boxes[:, 2:] -= boxes[:, :2]  # XYXY to XYWH
    columns = (boxes.tolist(), detections.scores.tolist(), classes, detections.exit_stages.tolist())
    results: list[dict[str, Any]] = [
        {
            "image_id": image_id,
            "category_id": category_ids[class_index],
            "bbox": box,
            "score": score,
            "exit_stage": exit_stage,
        }
        for box, score, class_index, exit_stage in zip(*columns, strict=True)
    ]
    for result, mask in zip(results, masks or (), strict=masks is not None):
        if mask is not None:
            result["segmentation"] = mask
    return results


def _array(values: Any) -> NDArray[Any]:
    # A tensor may be on another device.
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
