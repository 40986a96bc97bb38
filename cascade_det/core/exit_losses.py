"""How the learned parts of exits are trained: on what the full cascade made of all proposals.

The cascade runs without exits and without gradients; the losses reach the learned parts alone.
Shapes: R proposals of the whole batch, N images, G ground-truth boxes, S stages, F the width of a
box head's output. Boxes are float32 XYXY in absolute pixels of the resized image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou

from cascade_det.core.exits.learned import LearnedParts
from cascade_det.core.exits.view import BEFORE_STAGES, RegionView
from cascade_det.core.matching import Targets, label_regions
from cascade_det.core.record import CascadeRecord
from cascade_det.core.structures.boxes import flatten_images, paired_iou, select_class

# From here on a detection is right (PASCAL VOC), and a box has an object.
TRUE_POSITIVE_IOU = 0.5
COCO_IOUS = tuple(0.5 + 0.05 * i for i in range(10))


def exit_losses(
    parts: LearnedParts,
    record: CascadeRecord,
    gt_boxes: Sequence[Tensor],
    gt_classes: Sequence[Tensor],
    *,
    smallest_share: float = 1 / 32,
) -> dict[str, Tensor]:
    """Losses of the parts that are there; they have no gradient in what is recorded.

    The IoU head: squared error (Cascade-DETR, arXiv 2307.11035) to the IoU of the box that the
    stage refined with the ground truth that it overlaps best. Boxes of IoU >= 0.5 weigh as much in
    all as the many below do.

    The pruner: binary cross-entropy to ``ends_as_true_positive``, weighted as LEAR does (arXiv
    2105.02568, section 3): positives by 2, negatives by 1, each times n / (2 n_class) of its image.

    The gate: binary cross-entropy to ``loses_nothing``, over the regions whose most probable class
    is foreground: it is not asked about others.

    Pruner and gate look at the standing of a region among the live ones, which are fewer the more
    exits are in use. Each gate therefore sees all regions of half of the images, and in the others
    a random share of the best, drawn from torch's global generator.

    Args:
        parts: of S stages.
        record: of the full cascade on the N images, with what the parts look at: ``hidden`` for
            the IoU head, ``crops`` for a pruner that has channels for them.
        gt_boxes: per image float32 ``[G_i, 4]``, none empty; G_i may be 0.
        gt_classes: per image int64 ``[G_i]`` in ``[0, K)``.
        smallest_share: of the regions of an image that are live; 1 for always all.

    Returns:
        ``loss_exit_iou_stage<s>`` for every stage, ``loss_exit_gate_stage<s>`` for every stage but
        the last, ``loss_exit_pruner_gate<g>`` for every gate, g = s + 1 after stage s; scalars,
        exactly 0 where there are no regions to learn from.
    """
    boxes, image_index = flatten_images(gt_boxes)
    targets = Targets(boxes, torch.cat(list(gt_classes)), image_index)
    losses = {
        f"loss_exit_iou_stage{stage}": _iou_loss(parts, record, targets, stage)
        for stage in range(len(parts.iou_head))
    }
    found = ends_as_true_positive(record, targets) if len(parts.pruner) else None
    for stage in range(BEFORE_STAGES, parts.num_stages - 1):
        view = record.view(stage)
        rows = draw_live_rows(view, smallest_share)
        view = view[rows]
        if found is not None:
            loss = _pruner_loss(parts, view, found[rows])
            losses[f"loss_exit_pruner_gate{stage + 1}"] = loss
        if len(parts.gate) and stage > BEFORE_STAGES:
            ready = loses_nothing(record, targets, stage)[rows]
            losses[f"loss_exit_gate_stage{stage}"] = _gate_loss(parts, view, ready)
    return losses


@torch.no_grad()
def ends_as_true_positive(record: CascadeRecord, targets: Targets) -> Tensor:
    """Which regions the full cascade returns as a true positive.

    That is, a region is the source of a detection, after NMS and within the most that an image
    may have, that finds an object: by falling score, each detection takes the free ground truth of
    its class that it overlaps best, with IoU >= 0.5.

    Args:
        record: of the full cascade.
        targets: ground truth of the batch.

    Returns:
        bool ``[R]``.
    """
    scored = record.replay(None).scored
    # Each detection comes back with its region in the place of its exit stage.
    detections = record.select([replace(s, exit_stages=s.rows) for s in scored])
    found = torch.zeros_like(record.image_index, dtype=torch.bool)
    for image, of_image in enumerate(detections):
        objects = torch.nonzero(targets.image_index == image).squeeze(1)
        overlaps = box_iou(of_image.boxes, targets.boxes[objects])
        same_class = of_image.classes[:, None] == targets.classes[objects]
        matched = _greedy_matches(overlaps.where(same_class, 0.0).cpu())
        found[of_image.exit_stages[matched.to(found.device)]] = True
    return found


@torch.no_grad()
def loses_nothing(record: CascadeRecord, targets: Targets, stage: int) -> Tensor:
    """Which regions are as good after ``stage`` as after the last one.

    The box of the most probable foreground class overlaps an object of that class by IoU >= 0.5,
    and reaches with it at least as many of COCO's thresholds 0.5, 0.55, ..., 0.95 as the last
    stage's box of that class does with the same object.

    Args:
        record: of the full cascade.
        targets: ground truth of the batch.
        stage: from 0.

    Returns:
        bool ``[R]``.
    """
    classes = record.view(stage).classes
    if len(targets.boxes) == 0:
        return torch.zeros_like(classes, dtype=torch.bool)
    early, last = (select_class(record.stages[s].decoded, classes) for s in (stage, -1))
    overlaps = box_iou(early, targets.boxes)
    of_image = record.image_index[:, None] == targets.image_index
    of_class = classes[:, None] == targets.classes
    early_ious, objects = overlaps.where(of_image & of_class, 0.0).max(dim=1)
    reached = _thresholds_reached(early_ious)
    reached_at_last = _thresholds_reached(paired_iou(last, targets.boxes[objects]))
    return (reached > 0) & (reached >= reached_at_last)


def _iou_loss(parts: LearnedParts, record: CascadeRecord, targets: Targets, stage: int) -> Tensor:
    of_stage = record.stages[stage]
    assert of_stage.hidden is not None
    ious = label_regions(
        of_stage.boxes,
        record.image_index,
        targets,
        iou_threshold=TRUE_POSITIVE_IOU,
        num_classes=of_stage.total.shape[1] - 1,
    ).ious
    errors = (parts.predict_ious(stage, of_stage.hidden.detach()) - ious) ** 2
    groups = (ious >= TRUE_POSITIVE_IOU).long()
    return _weighted_mean(errors, 1.0 / torch.bincount(groups, minlength=2)[groups])


def _pruner_loss(parts: LearnedParts, view: RegionView, found: Tensor) -> Tensor:
    groups = 2 * view.image_index + found
    of_group = torch.bincount(groups, minlength=2 * view.num_images)[groups]
    balance = view.counts[view.image_index] / (2.0 * of_group)
    losses = F.binary_cross_entropy_with_logits(
        parts.continue_logits(view), found.float(), reduction="none"
    )
    return _weighted_mean(losses, balance * (1.0 + found))


def _gate_loss(parts: LearnedParts, view: RegionView, ready: Tensor) -> Tensor:
    losses = F.binary_cross_entropy_with_logits(
        parts.readiness_logits(view), ready.float(), reduction="none"
    )
    return _weighted_mean(losses, view.is_foreground.float())


def _weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """Over rows; exactly 0, with gradients, where all weights are 0."""
    return (losses * weights).sum() / weights.sum().clamp(min=1e-6)


def draw_live_rows(view: RegionView, smallest_share: float) -> Tensor:
    """Rows of all regions for half of the images, of a log-uniform share for the others."""
    draws = torch.rand(view.num_images).to(view.boxes.device)
    shares = smallest_share ** (2 * draws - 1).clamp(min=0)
    live = torch.ceil(shares * view.counts)
    return torch.nonzero(view.ranks < live[view.image_index]).squeeze(1)


def _greedy_matches(overlaps: Tensor) -> Tensor:
    """Rows of detections that find an object: int64, of ``[D, G]`` IoUs on the CPU."""
    matched = []
    for row in range(len(overlaps) if overlaps.shape[1] else 0):
        overlap, column = overlaps[row].max(dim=0)
        if overlap >= TRUE_POSITIVE_IOU:
            matched.append(row)
            overlaps[:, column] = 0.0
    return torch.tensor(matched, dtype=torch.int64)


def _thresholds_reached(ious: Tensor) -> Tensor:
    """int64 ``[R]``: how many of ``COCO_IOUS`` each IoU reaches."""
    return (ious[:, None] >= ious.new_tensor(COCO_IOUS)).sum(dim=1)
