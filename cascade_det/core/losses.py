"""The losses of one stage: classification and box regression."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import (
    complete_box_iou_loss,
    distance_box_iou_loss,
    generalized_box_iou_loss,
)

from cascade_det.core.structures.boxes import Weights, decode_boxes, encode_boxes

IOU_LOSSES: dict[str, Callable[..., Tensor]] = {
    "giou": generalized_box_iou_loss,
    "diou": distance_box_iou_loss,
    "ciou": complete_box_iou_loss,
}
BOX_LOSSES = ("smooth_l1", *IOU_LOSSES)


def classification_loss(logits: Tensor, gt_classes: Tensor) -> Tensor:
    """Mean softmax cross-entropy over all regions; exactly 0, with gradients, without regions.

    Args:
        logits: ``[R, K + 1]``.
        gt_classes: int64 ``[R]`` in ``[0, K]``.
    """
    if len(gt_classes) == 0:
        return logits.sum() * 0.0
    return F.cross_entropy(logits.float(), gt_classes)


def box_loss(
    deltas: Tensor,
    boxes: Tensor,
    gt_boxes: Tensor,
    *,
    weights: Weights,
    loss_type: str,
    smooth_l1_beta: float,
) -> Tensor:
    """Sum of the regression losses of matched boxes.

    Args:
        deltas: ``[F, 4]``, predictions of F foreground regions.
        boxes: float32 ``[F, 4]``, to which the deltas apply.
        gt_boxes: float32 ``[F, 4]``.
        weights: multipliers of the deltas.
        loss_type: one of ``BOX_LOSSES``; smooth L1 compares deltas, the IoU losses compare boxes.
        smooth_l1_beta: where smooth L1 turns from quadratic to linear; 0 is L1.

    Raises:
        ValueError: for an unknown ``loss_type``.
    """
    if loss_type == "smooth_l1":
        targets = encode_boxes(boxes, gt_boxes, weights)
        return F.smooth_l1_loss(deltas.float(), targets, reduction="sum", beta=smooth_l1_beta)
    if loss_type not in IOU_LOSSES:
        raise ValueError(f"unknown box loss {loss_type!r}; known: {', '.join(BOX_LOSSES)}")
    return IOU_LOSSES[loss_type](decode_boxes(deltas, boxes, weights), gt_boxes, reduction="sum")
