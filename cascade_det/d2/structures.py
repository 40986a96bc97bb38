"""Detectron2's ``Instances`` to the core's types and back.

Boxes are float32 XYXY in absolute pixels of the resized image in both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.structures import Boxes, Instances
from detectron2.structures.boxes import matched_pairwise_iou

from cascade_det.core import Detections
from cascade_det.core.boxes import flatten_images
from cascade_det.core.matching import LabelledRegions, Targets


def targets_of(instances: Sequence[Instances]) -> Targets:
    """The ground truth of a batch, from the fields ``gt_boxes`` and ``gt_classes``."""
    boxes, image_index = flatten_images([x.gt_boxes.tensor for x in instances])
    return Targets(boxes, torch.cat([x.gt_classes for x in instances]), image_index)


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
    gt_classes = torch.cat([x.gt_classes for x in proposals])
    return LabelledRegions(boxes, image_index, gt_classes, gt_boxes, ious)


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
