"""Conversion between Detectron2's ``Instances``, the core's types and plain samples.

Boxes are float32 XYXY in absolute pixels of the resized image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from detectron2.structures.boxes import matched_pairwise_iou
from torch import Tensor

from cascade_det.core import Detections
from cascade_det.core.matching import GroundTruth, LabelledRegions
from cascade_det.core.structures.boxes import flatten_images

_MAX_COORDINATE = 1e5  # pixels, of a polygon
_SAVED_TYPES = (Tensor, Boxes, BitMasks, PolygonMasks, Keypoints)


def to_ground_truth(instances: Sequence[Instances]) -> GroundTruth:
    """The ground truth of a batch from the fields ``gt_boxes`` and ``gt_classes``."""
    boxes, image_index = flatten_images([x.gt_boxes.tensor for x in instances])
    return GroundTruth(boxes, _classes(instances), image_index)


def to_labelled_regions(proposals: Sequence[Instances]) -> LabelledRegions:
    """Sampled proposals with their matched boxes; images without objects lack ``gt_boxes``."""
    boxes, image_index = flatten_images([x.proposal_boxes.tensor for x in proposals])
    gt_boxes = torch.cat(
        [
            x.gt_boxes.tensor if x.has("gt_boxes") else torch.zeros_like(x.proposal_boxes.tensor)
            for x in proposals
        ]
    )
    ious = matched_pairwise_iou(Boxes(boxes), Boxes(gt_boxes))
    unused = torch.zeros_like(image_index)
    return LabelledRegions(boxes, image_index, _classes(proposals), gt_boxes, ious, unused)


def objectness_logits(proposals: list[Instances]) -> list[Tensor] | None:
    """Objectness logits of proposals, float32 ``[R_i]`` per image; ``None`` without the field."""
    if not all(x.has("objectness_logits") for x in proposals):
        return None
    return [x.objectness_logits.float() for x in proposals]


def to_instances(detections: Detections, image_size: tuple[int, int]) -> Instances:
    """Detections of one image as Detectron2's heads return them, plus ``exit_stages``.

    Args:
        detections: of one image.
        image_size: ``(height, width)`` in pixels.
    """
    return Instances(
        image_size,
        pred_boxes=Boxes(detections.boxes),
        scores=detections.scores,
        pred_classes=detections.classes,
        exit_stages=detections.exit_stages,
    )


def to_detections(instances: Instances) -> Detections:
    """The reverse of ``to_instances``; missing ``exit_stages`` become 0."""
    has_stages = instances.has("exit_stages")
    return Detections(
        instances.pred_boxes.tensor,
        instances.scores,
        instances.pred_classes,
        instances.exit_stages if has_stages else torch.zeros_like(instances.pred_classes),
    )


def to_sample(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A training input of one image as tensors and plain values, for a file."""
    plain = {k: v for k, v in inputs.items() if isinstance(v, (Tensor, int, float, str))}
    fields = inputs["instances"].get_fields() if "instances" in inputs else {}
    return {**plain, **{k: _to_plain(v) for k, v in fields.items() if isinstance(v, _SAVED_TYPES)}}


def to_inputs(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of ``to_sample``: entries named ``gt_...`` become fields of ``instances``."""
    fields = {
        name: _to_field(name, value) for name, value in sample.items() if name.startswith("gt_")
    }
    rest = {name: value for name, value in sample.items() if name not in fields}
    return {**rest, "instances": Instances(tuple(sample["image"].shape[-2:]), **fields)}


def check_masks_and_keypoints(sample: Mapping[str, Any]) -> None:
    """Check the masks and keypoints of a sample of ``to_sample``, if it has any.

    Raises:
        ValueError: there is not one for each box, or they are not polygons, bit masks or keypoints,
            or far outside any image.
    """
    count = len(sample["gt_boxes"]) if "gt_boxes" in sample else 0
    masks, keypoints = sample.get("gt_masks"), sample.get("gt_keypoints")
    if isinstance(masks, Tensor):
        good = masks.shape == (count, *sample["image"].shape[-2:])
    else:
        good = masks is None or (
            isinstance(masks, list)
            and len(masks) == count
            and all(isinstance(m, list) and m and all(map(_is_polygon, m)) for m in masks)
        )
    if not good:
        raise ValueError("its masks are not one for each box, of polygons or of bits")
    if keypoints is not None and (
        not isinstance(keypoints, Tensor) or keypoints.shape != (count, *keypoints.shape[1:2], 3)
    ):
        raise ValueError("its keypoints are not [G, K, 3]")


def _is_polygon(points: Any) -> bool:
    """Whether these are x, y, x, y, ... of at least three points; the rasteriser does not check."""
    return (
        isinstance(points, Tensor)
        and points.dim() == 1
        and len(points) >= 6
        and len(points) % 2 == 0
        and bool((points.abs() <= _MAX_COORDINATE).all())  # False for NaN
    )


def _classes(instances: Sequence[Instances]) -> Tensor:
    # Some mappers give an image without objects torch.tensor([]), which is float.
    return torch.cat([x.gt_classes.to(torch.int64) for x in instances])


def _to_plain(value: Any) -> Any:
    if isinstance(value, PolygonMasks):
        return [[torch.as_tensor(p) for p in polygons] for polygons in value.polygons]
    return value if isinstance(value, Tensor) else value.tensor


def _to_field(name: str, value: Any) -> Any:
    if name == "gt_masks":
        if isinstance(value, Tensor):
            return BitMasks(value)
        return PolygonMasks([[polygon.numpy() for polygon in polygons] for polygons in value])
    kind = {"gt_boxes": Boxes, "gt_keypoints": Keypoints}.get(name)
    return value if kind is None else kind(value)
