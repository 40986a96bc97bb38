"""Detectron2's ``Instances`` to the core's types, or to plain ones, and back.

Boxes are float32 XYXY in absolute pixels of the resized image in both.
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

_FARTHEST = 1e5  # pixels, of a polygon's point
_KNOWN = (Tensor, Boxes, BitMasks, PolygonMasks, Keypoints)


def targets_of(instances: Sequence[Instances]) -> GroundTruth:
    """The ground truth of a batch, from the fields ``gt_boxes`` and ``gt_classes``."""
    boxes, image_index = flatten_images([x.gt_boxes.tensor for x in instances])
    return GroundTruth(boxes, _classes(instances), image_index)


def labelled_regions_of(proposals: Sequence[Instances]) -> LabelledRegions:
    """Sampled proposals; images without ground truth have no field ``gt_boxes``."""
    boxes, image_index = flatten_images([x.proposal_boxes.tensor for x in proposals])
    gt_boxes = torch.cat(
        [
            x.gt_boxes.tensor if x.has("gt_boxes") else torch.zeros_like(x.proposal_boxes.tensor)
            for x in proposals
        ]
    )
    ious = matched_pairwise_iou(Boxes(boxes), Boxes(gt_boxes))
    return LabelledRegions(boxes, image_index, _classes(proposals), gt_boxes, ious)


def instances_of(detections: Detections, image_size: tuple[int, int]) -> Instances:
    """Detections of one image as Detectron2's heads return them, with ``exit_stages`` beside."""
    return Instances(
        image_size,
        pred_boxes=Boxes(detections.boxes),
        scores=detections.scores,
        pred_classes=detections.classes,
        exit_stages=detections.exit_stages,
    )


def detections_of(instances: Instances) -> Detections:
    """The reverse of ``instances_of``; without ``exit_stages`` every region counts as stage 0."""
    has_stages = instances.has("exit_stages")
    return Detections(
        instances.pred_boxes.tensor,
        instances.scores,
        instances.pred_classes,
        instances.exit_stages if has_stages else torch.zeros_like(instances.pred_classes),
    )


def sample_of(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """One image's input of a training model as tensors and plain values, for a file."""
    plain = {k: v for k, v in inputs.items() if isinstance(v, (Tensor, int, float, str))}
    fields = inputs["instances"].get_fields() if "instances" in inputs else {}
    return {**plain, **{k: _plain(v) for k, v in fields.items() if isinstance(v, _KNOWN)}}


def inputs_of(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of ``sample_of``: fields whose names begin with ``gt_`` become instances."""
    fields = {name: _rich(name, value) for name, value in sample.items() if name.startswith("gt_")}
    rest = {name: value for name, value in sample.items() if name not in fields}
    return {**rest, "instances": Instances(tuple(sample["image"].shape[-2:]), **fields)}


def check_shapes_of(sample: Mapping[str, Any]) -> None:
    """Check the masks and keypoints of a sample, see ``sample_of``, as far as it has any.

    Raises:
        ValueError: there is not one for each box, or they are not polygons, bit masks or keypoints
            anywhere near an image.
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
    """Whether these are x, y, x, y, ... of three points or more; what draws them checks nothing."""
    return (
        isinstance(points, Tensor)
        and points.dim() == 1
        and len(points) >= 6
        and len(points) % 2 == 0
        and bool((points.abs() <= _FARTHEST).all())  # NaN is not
    )


def _classes(instances: Sequence[Instances]) -> Tensor:
    # Mappers of users give an image without objects torch.tensor([]), which is float.
    return torch.cat([x.gt_classes.to(torch.int64) for x in instances])


def _plain(value: Any) -> Any:
    if isinstance(value, PolygonMasks):
        return [[torch.as_tensor(p) for p in polygons] for polygons in value.polygons]
    return value if isinstance(value, Tensor) else value.tensor


def _rich(name: str, value: Any) -> Any:
    if name == "gt_masks":
        if isinstance(value, Tensor):
            return BitMasks(value)
        return PolygonMasks([[polygon.numpy() for polygon in polygons] for polygons in value])
    rich = {"gt_boxes": Boxes, "gt_keypoints": Keypoints}.get(name)
    return value if rich is None else rich(value)


def objectness_of(proposals: list[Instances]) -> list[Tensor] | None:
    """Per image the logits ``[R_i]`` of proposals; ``None`` if they do not carry them."""
    if not all(x.has("objectness_logits") for x in proposals):
        return None
    return [x.objectness_logits.float() for x in proposals]
