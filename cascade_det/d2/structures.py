"""Conversion between Detectron2's ``Instances``, the core's types and plain samples.

Boxes are float32 XYXY in absolute pixels of the resized image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from detectron2.modeling import detector_postprocess
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from detectron2.structures.boxes import matched_pairwise_iou
from detectron2.structures.masks import polygons_to_bitmask
from torch import Tensor

from cascade_det.core import Detections
from cascade_det.core.matching import GroundTruth, LabelledRegions
from cascade_det.core.structures.boxes import flatten_images
from cascade_det.engine.batches import is_mask

_SAVED_TYPES = (Tensor, Boxes, BitMasks, PolygonMasks, Keypoints)


class InstanceMasks:
    """The field ``gt_masks`` of a batch's objects, cropped by Detectron2.

    Args:
        instances: of each image; the masks of an image without the field are unknown.
    """

    def __init__(self, instances: Sequence[Instances]) -> None:
        self._masks = [x.gt_masks if x.has("gt_masks") else None for x in instances]
        boxes, self._image_index = flatten_images([x.gt_boxes.tensor for x in instances])
        self._first = [0, *accumulate(map(len, instances))]
        has_masks = torch.tensor([m is not None for m in self._masks], device=boxes.device)
        self.known = has_masks[self._image_index]

    def crop(self, objects: Tensor, boxes: Tensor, size: int) -> Tensor:
        """As ``cascade_det.core.matching.TrueMasks``."""
        targets = torch.zeros(len(boxes), size, size, dtype=torch.bool, device=boxes.device)
        of_image = self._image_index[objects]
        for image, masks in enumerate(self._masks):
            rows = torch.nonzero(of_image == image).squeeze(1)
            if masks is not None and len(rows):
                own = masks[objects[rows] - self._first[image]]
                targets[rows] = own.crop_and_resize(boxes[rows], size).to(boxes.device)
        return targets


def to_ground_truth(instances: Sequence[Instances], *, masks: bool = False) -> GroundTruth:
    """The ground truth of a batch from the fields ``gt_boxes``, ``gt_classes`` and ``gt_masks``.

    Args:
        instances: of each image.
        masks: whether to take the masks.
    """
    boxes, image_index = flatten_images([x.gt_boxes.tensor for x in instances])
    own_masks = InstanceMasks(instances) if masks else None
    return GroundTruth(boxes, _classes(instances), image_index, own_masks)


def number_objects(targets: Sequence[Instances]) -> list[Instances]:
    """Ground truth with one more field, ``gt_index``: the number of each object in the batch.

    Sampled proposals get every field of their object whose name begins with ``gt_``.
    """
    numbered, first = [], 0
    for own in targets:
        index = torch.arange(first, first + len(own), device=own.gt_boxes.device)
        numbered.append(Instances(own.image_size, **own.get_fields(), gt_index=index))
        first += len(own)
    return numbered


def to_labelled_regions(proposals: Sequence[Instances]) -> LabelledRegions:
    """Sampled proposals with their matched objects, numbered if these are.

    Images without objects lack ``gt_boxes`` and ``gt_index``.
    """
    boxes, image_index = flatten_images([x.proposal_boxes.tensor for x in proposals])
    gt_boxes = torch.cat(
        [
            x.gt_boxes.tensor if x.has("gt_boxes") else torch.zeros_like(x.proposal_boxes.tensor)
            for x in proposals
        ]
    )
    ious = matched_pairwise_iou(Boxes(boxes), Boxes(gt_boxes))
    gt_index = torch.cat(
        [
            x.gt_index if x.has("gt_index") else torch.zeros_like(x.gt_classes, dtype=torch.int64)
            for x in proposals
        ]
    )
    classes = _classes(proposals)
    return LabelledRegions(boxes, image_index, classes, gt_boxes, ious, gt_index)


def objectness_logits(proposals: list[Instances]) -> list[Tensor] | None:
    """Objectness logits of proposals, float32 ``[R_i]`` per image; ``None`` without the field."""
    if not all(x.has("objectness_logits") for x in proposals):
        return None
    return [x.objectness_logits.float() for x in proposals]


def to_instances(detections: Detections, image_size: tuple[int, int]) -> Instances:
    """Detections of one image as Detectron2's heads return them, plus ``exit_stages``.

    Masks become ``pred_masks`` ``[D, 1, M, M]``.

    Args:
        detections: of one image.
        image_size: ``(height, width)`` in pixels.
    """
    instances = Instances(
        image_size,
        pred_boxes=Boxes(detections.boxes),
        scores=detections.scores,
        pred_classes=detections.classes,
        exit_stages=detections.exit_stages,
    )
    if detections.masks is not None:
        instances.pred_masks = detections.masks[:, None]
    return instances


def to_detections(instances: Instances) -> Detections:
    """The reverse of ``to_instances``; missing ``exit_stages`` become 0.

    Takes masks that are probabilities in each box, not those pasted into the image.
    """
    has_stages = instances.has("exit_stages")
    return Detections(
        instances.pred_boxes.tensor,
        instances.scores,
        instances.pred_classes,
        instances.exit_stages if has_stages else torch.zeros_like(instances.pred_classes),
        _box_masks(instances),
    )


def postprocess(instances: Instances, height: int, width: int) -> tuple[Instances, Detections]:
    """Detectron2's ``detector_postprocess``, and its result as detections.

    Args:
        instances: of one image, as the heads return them; changed in place.
        height: of the original image in pixels.
        width: of that image.

    Returns:
        Instances with masks of the whole image, and detections with the probabilities in each box.
    """
    masks = _box_masks(instances)
    if masks is not None:
        instances.box_masks = masks
    output = detector_postprocess(instances, height, width)
    if masks is not None:
        masks = output.box_masks
        output.remove("box_masks")
    return output, replace(to_detections(output), masks=masks)


def to_sample(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A training input of one image as tensors and plain values, for a file."""
    plain = {k: v for k, v in inputs.items() if isinstance(v, (Tensor, int, float, str))}
    fields = inputs["instances"].get_fields() if "instances" in inputs else {}
    return {**plain, **{k: _to_plain(v) for k, v in fields.items() if isinstance(v, _SAVED_TYPES)}}


def to_inputs(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of ``to_sample``: entries named ``gt_...`` become fields of ``instances``.

    Also takes samples of the standalone host, where each object has polygons or a bitmap.
    """
    size = tuple(sample["image"].shape[-2:])
    fields = {
        name: _to_masks(value, size) if name == "gt_masks" else _to_field(name, value)
        for name, value in sample.items()
        if name.startswith("gt_")
    }
    rest = {name: value for name, value in sample.items() if name not in fields}
    return {**rest, "instances": Instances(size, **fields)}


def check_masks_and_keypoints(sample: Mapping[str, Any]) -> None:
    """Check the masks and keypoints of a sample of ``to_sample``, if it has any.

    Raises:
        ValueError: there is not one for each box, or they are not polygons, bit masks or keypoints,
            or far outside any image. A mask may not be unknown, as in the standalone host.
    """
    count = len(sample["gt_boxes"]) if "gt_boxes" in sample else 0
    size = sample["image"].shape[-2:]
    masks, keypoints = sample.get("gt_masks"), sample.get("gt_keypoints")
    if isinstance(masks, Tensor):
        good = masks.shape == (count, *size)
    else:
        good = masks is None or (
            isinstance(masks, list)
            and len(masks) == count
            and all(is_mask(mask, size) for mask in masks)
        )
    if not good:
        raise ValueError("its masks are not one for each box, of polygons or of bits")
    if keypoints is not None and (
        not isinstance(keypoints, Tensor) or keypoints.shape != (count, *keypoints.shape[1:2], 3)
    ):
        raise ValueError("its keypoints are not [G, K, 3]")


def _box_masks(instances: Instances) -> Tensor | None:
    """Float32 ``[D, M, M]`` of masks that are not pasted yet; else ``None``."""
    masks = instances.pred_masks if instances.has("pred_masks") else None
    if not isinstance(masks, Tensor) or masks.dim() != 4:
        return None
    return masks[:, 0].float()


def _classes(instances: Sequence[Instances]) -> Tensor:
    # Some mappers give an image without objects torch.tensor([]), which is float.
    return torch.cat([x.gt_classes.to(torch.int64) for x in instances])


def _to_plain(value: Any) -> Any:
    if isinstance(value, PolygonMasks):
        return [[torch.as_tensor(p) for p in polygons] for polygons in value.polygons]
    return value if isinstance(value, Tensor) else value.tensor


def _to_field(name: str, value: Any) -> Any:
    kind = {"gt_boxes": Boxes, "gt_keypoints": Keypoints}.get(name)
    return value if kind is None else kind(value)


def _to_masks(masks: Any, size: tuple[int, int]) -> PolygonMasks | BitMasks:
    if isinstance(masks, Tensor):
        return BitMasks(masks)
    of_arrays = [
        mask if isinstance(mask, Tensor) else [polygon.numpy() for polygon in mask]
        for mask in masks
    ]
    if not any(isinstance(mask, Tensor) for mask in masks):
        return PolygonMasks(of_arrays)
    drawn = [
        mask if isinstance(mask, Tensor) else torch.from_numpy(polygons_to_bitmask(mask, *size))
        for mask in of_arrays
    ]
    return BitMasks(torch.stack(drawn))
