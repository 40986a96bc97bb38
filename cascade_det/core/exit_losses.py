"""Losses of the learned parts of exits, on a record of the full cascade.

The record has no gradients: the losses train the learned parts alone.
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
from cascade_det.core.matching import GroundTruth, label_regions, match_greedily
from cascade_det.core.record import CascadeRecord
from cascade_det.core.structures.boxes import paired_iou, select_class
from cascade_det.core.structures.on_device import group_sizes
from cascade_det.core.tile_losses import TileOrigins, tile_loss

# The IoU of a true positive (PASCAL VOC).
TRUE_POSITIVE_IOU = 0.5
COCO_IOUS = tuple(0.5 + 0.05 * i for i in range(10))


def exit_losses(
    parts: LearnedParts,
    record: CascadeRecord,
    gt_boxes: Sequence[Tensor],
    gt_classes: Sequence[Tensor],
    *,
    origins: TileOrigins | None = None,
    smallest_share: float = 1 / 32,
) -> dict[str, Tensor]:
    """Losses of the existing parts.

    IoU head: squared error (Cascade-DETR, arXiv 2307.11035) to the largest IoU of the refined box
    with an object. Boxes of IoU >= 0.5 have the same total weight as those below.

    Pruner: binary cross-entropy to ``ends_as_true_positive``, weighted as in LEAR (arXiv
    2105.02568, section 3): positives by 2, negatives by 1, each times n / (2 n_class) of its image.

    Gate: binary cross-entropy to ``loses_nothing``, over the regions whose most probable class is
    foreground; only these can exit as confident.

    Tile head: see ``tile_loss``.

    Pruner and gate see the rank of a region among the live ones, which exits make fewer. Each
    gate is therefore trained on all regions of half of the images, and on a random share of the
    best regions of the others, drawn from torch's global generator.

    Args:
        parts: of S stages.
        record: of the full cascade on the N images, with ``hidden`` for the IoU head and
            ``crops`` for a pruner with crop channels.
        gt_boxes: per image float32 ``[G_i, 4]``, none empty; G_i may be 0.
        gt_classes: per image int64 ``[G_i]`` in ``[0, K)``.
        origins: of the proposals, for a tile head.
        smallest_share: the smallest random share of live regions; 1 keeps all.

    Returns:
        ``loss_exit_iou_stage<s>`` for every stage, ``loss_exit_gate_stage<s>`` for every stage but
        the last, ``loss_exit_pruner_gate<g>`` for every gate, g = s + 1 after stage s, and
        ``loss_exit_tiles``; scalars, those of regions exactly 0 without any to train on.

    Raises:
        ValueError: there is a tile head, but no ``origins``.
    """
    ground_truth = GroundTruth.from_images(gt_boxes, gt_classes)
    losses = {
        f"loss_exit_iou_stage{stage}": _iou_loss(parts, record, ground_truth, stage)
        for stage in range(len(parts.iou_head))
    }
    if parts.tile_head is not None:
        if origins is None:
            raise ValueError("a tile head learns from the tiles that proposals come from")
        losses["loss_exit_tiles"] = tile_loss(parts.tile_head, record, origins)
    found = ends_as_true_positive(record, ground_truth) if len(parts.pruner) else None
    for stage in range(BEFORE_STAGES, parts.num_stages - 1):
        view = record.view(stage)
        rows = draw_live_rows(view, smallest_share)
        view = view[rows]
        if found is not None:
            loss = _pruner_loss(parts, view, found[rows])
            losses[f"loss_exit_pruner_gate{stage + 1}"] = loss
        if len(parts.gate) and stage > BEFORE_STAGES:
            ready = loses_nothing(record, ground_truth, stage)[rows]
            losses[f"loss_exit_gate_stage{stage}"] = _gate_loss(parts, view, ready)
    return losses


@torch.no_grad()
def ends_as_true_positive(record: CascadeRecord, ground_truth: GroundTruth) -> Tensor:
    """Regions whose detection by the full cascade is a true positive.

    Detections, after NMS and the limit per image, are matched greedily to the objects of their
    class with IoU >= 0.5, see ``match_greedily``.

    Args:
        record: of the full cascade.
        ground_truth: objects of the batch.

    Returns:
        bool ``[R]``.
    """
    reported = record.replay(None).reported
    # ``exit_stages`` carries the region of each detection through NMS.
    detections = record.select([replace(r, exit_stages=r.proposal_index) for r in reported])
    found = torch.zeros_like(record.image_index, dtype=torch.bool)
    for image, own in enumerate(detections):
        objects = torch.nonzero(ground_truth.image_index == image).squeeze(1)
        overlaps = box_iou(own.boxes, ground_truth.boxes[objects])  # [D, G]
        same_class = own.classes[:, None] == ground_truth.classes[objects]
        (matches,) = match_greedily(overlaps.where(same_class, 0.0).cpu(), [TRUE_POSITIVE_IOU])
        found[own.exit_stages[(matches >= 0).to(found.device)]] = True
    return found


@torch.no_grad()
def loses_nothing(record: CascadeRecord, ground_truth: GroundTruth, stage: int) -> Tensor:
    """Regions that are as good after ``stage`` as after the last one.

    The box of the most probable foreground class has IoU >= 0.5 with an object of that class, and
    reaches at least as many of COCO's thresholds 0.5, 0.55, ..., 0.95 as the last stage's box of
    that class reaches with the same object.

    Args:
        record: of the full cascade.
        ground_truth: objects of the batch.
        stage: from 0.

    Returns:
        bool ``[R]``.
    """
    classes = record.view(stage).classes  # [R]
    if len(ground_truth.boxes) == 0:
        return torch.zeros_like(classes, dtype=torch.bool)
    early, last = (select_class(record.stages[s].decoded, classes) for s in (stage, -1))  # [R, 4]
    overlaps = box_iou(early, ground_truth.boxes)  # [R, G]
    same_image = record.image_index[:, None] == ground_truth.image_index
    same_class = classes[:, None] == ground_truth.classes
    early_ious, objects = overlaps.where(same_image & same_class, 0.0).max(dim=1)
    reached = _thresholds_reached(early_ious)
    reached_at_last = _thresholds_reached(paired_iou(last, ground_truth.boxes[objects]))
    return (reached > 0) & (reached >= reached_at_last)


def _iou_loss(
    parts: LearnedParts, record: CascadeRecord, ground_truth: GroundTruth, stage: int
) -> Tensor:
    recorded = record.stages[stage]
    assert recorded.hidden is not None
    ious = label_regions(
        recorded.boxes,
        record.image_index,
        ground_truth,
        iou_threshold=TRUE_POSITIVE_IOU,
        num_classes=recorded.score_state.shape[1] - 1,
    ).ious
    errors = (parts.predict_ious(stage, recorded.hidden.detach()) - ious) ** 2
    groups = (ious >= TRUE_POSITIVE_IOU).long()
    return _weighted_mean(errors, 1.0 / group_sizes(groups, 2)[groups])


def _pruner_loss(parts: LearnedParts, view: RegionView, found: Tensor) -> Tensor:
    groups = 2 * view.image_index + found
    sizes = group_sizes(groups, 2 * view.num_images)[groups]
    balance = view.counts[view.image_index] / (2.0 * sizes)
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
    """Weighted mean over rows; exactly 0, with gradients, if all weights are 0."""
    return (losses * weights).sum() / weights.sum().clamp(min=1e-6)


def draw_live_rows(view: RegionView, smallest_share: float) -> Tensor:
    """Indices of all regions in half of the images, of a log-uniform share in the others."""
    draws = torch.rand(view.num_images).to(view.boxes.device)
    shares = smallest_share ** (2 * draws - 1).clamp(min=0)
    live = torch.ceil(shares * view.counts)
    return torch.nonzero(view.ranks < live[view.image_index]).squeeze(1)


def _thresholds_reached(ious: Tensor) -> Tensor:
    """int64 ``[R]``: how many of ``COCO_IOUS`` each IoU reaches."""
    return (ious[:, None] >= ious.new_tensor(COCO_IOUS)).sum(dim=1)
