"""Detections in the forms of other programs: COCO, Hugging Face, supervision; without PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cascade_det.errors import DatasetError

if TYPE_CHECKING:
    import supervision

EncodedMasks = Sequence[dict[str, Any] | None] | None

EXIT_STAGE = "exit_stage"
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


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
        masks: their RLE, see ``cascade_det.data.coco_results.encode_masks``; a detection without a
            mask gets no ``segmentation``.

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
    boxes = as_array(detections.boxes).copy()
    boxes[:, 2:] -= boxes[:, :2]  # XYXY to XYWH
    columns = (boxes.tolist(), detections.scores.tolist(), classes, detections.exit_stages.tolist())
    results: list[dict[str, Any]] = [
        {
            "image_id": image_id,
            "category_id": category_ids[class_index],
            "bbox": box,
            "score": score,
            EXIT_STAGE: exit_stage,
        }
        for box, score, class_index, exit_stage in zip(*columns, strict=True)
    ]
    for result, mask in zip(results, masks or (), strict=masks is not None):
        if mask is not None:
            result["segmentation"] = mask
    return results


def labelled_boxes(detections: Any, class_names: Sequence[str] | None) -> list[dict[str, Any]]:
    """Detections as the ``object-detection`` pipeline of Hugging Face's transformers gives them.

    Args:
        detections: ``Detections`` or ``ArrayDetections``.
        class_names: K names; ``None`` for ``class 0``, ...

    Returns:
        For each detection ``score``, ``label`` and ``box``, a dict of ``xmin``, ``ymin``, ``xmax``
        and ``ymax`` in whole pixels, rounded towards 0.

    Raises:
        ValueError: a class has no name.
    """
    boxes = as_array(detections.boxes).astype(np.int64).tolist()
    labels = _labels(detections, class_names)
    return [
        {"score": score, "label": label, "box": dict(zip(_CORNERS, box, strict=True))}
        for score, label, box in zip(detections.scores.tolist(), labels, boxes, strict=True)
    ]


def supervision_detections(
    detections: Any, class_names: Sequence[str] | None, masks: NDArray[np.bool_] | None
) -> supervision.Detections:
    """Detections of an image as those of supervision.

    Args:
        detections: ``Detections`` or ``ArrayDetections``.
        class_names: K names, for ``data["class_name"]``; ``None`` for ``class 0``, ...
        masks: ``[D, height, width]``.

    Raises:
        ImportError: supervision is not installed.
        ValueError: a class has no name.
    """
    try:
        import supervision
    except ImportError as error:
        raise ImportError(
            f"to_supervision() needs supervision, which cannot be imported ({error}): "
            "pip install supervision, the extra [supervision] of cascade_det"
        ) from error
    return supervision.Detections(
        xyxy=as_array(detections.boxes),
        mask=masks,
        confidence=as_array(detections.scores),
        class_id=as_array(detections.classes),
        data={
            # supervision's annotators and sinks read names under this key.
            "class_name": np.array(_labels(detections, class_names), dtype=np.str_),
            EXIT_STAGE: as_array(detections.exit_stages),
        },
    )


def as_array(values: Any) -> NDArray[Any]:
    """A tensor of any device, or an array, as an array."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _labels(detections: Any, class_names: Sequence[str] | None) -> list[str]:
    classes = detections.classes.tolist()
    if class_names is None:
        return [f"class {k}" for k in classes]
    if classes and max(classes) >= len(class_names):
        raise ValueError(
            f"class_names has {len(class_names)} names, but there are detections of class "
            f"{max(classes)}, counted from 0: give the class_names of the predictor"
        )
    return [class_names[k] for k in classes]
