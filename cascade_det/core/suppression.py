"""What replaces NMS: soft-NMS and weighted box fusion, for the detections of one image.

C candidates. Boxes of different classes never meet. Both run without a wait for a GPU but one, as a
loop over detections whose every step looks at all candidates.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torchvision.ops import box_iou

from cascade_det.core.structures import Detections
from cascade_det.core.structures.on_device import is_recorded

# "nms" is that of ``select_detections``.
SUPPRESSIONS = ("nms", "soft_linear", "soft_gaussian", "wbf")


def soften(
    candidates: Detections, *, score_thresh: float, iou: float, sigma: float | None, most: int
) -> Detections:
    """Soft-NMS (arXiv 1704.04503): boxes that overlap a better one score less.

    The best box is taken, the scores of the others are lowered by their IoU with it, and so on:
    times 1 - IoU from ``iou`` on, or with ``sigma`` times exp(-IoU^2 / sigma) at any IoU.

    Args:
        candidates: C, in any order.
        score_thresh: detections score above it, with their lowered score.
        iou: of the linear kind.
        sigma: of the Gaussian kind; ``None`` for the linear one.
        most: detections to return; negative for no limit.

    Returns:
        Best first, with lowered scores. These keep their gradient.
    """
    _refuse_recording("soft-NMS")
    count = len(candidates)
    boxes, classes, scores = candidates.boxes, candidates.classes, candidates.scores
    rows, taken = [], []
    is_left = torch.ones_like(classes, dtype=torch.bool)
    # Scores only fall, so detections come in order, and the loop may end at the limit.
    for _ in range(count if most < 0 else min(count, most)):
        best = torch.where(is_left, scores, -1.0).argmax()[None]  # [1]
        rows.append(best)
        taken.append(scores[best])
        is_left = is_left.index_fill(0, best, False)
        overlaps = _ious(boxes[best], boxes)  # [C]
        if sigma is None:
            kept = torch.where(overlaps >= iou, 1 - overlaps, 1.0)
        else:
            kept = torch.exp(-(overlaps**2) / sigma)
        scores = torch.where(is_left & (classes == classes[best]), scores * kept, scores)
    if not rows:
        return candidates
    order, lowered = torch.cat(rows), torch.cat(taken)
    above = torch.nonzero(lowered > score_thresh).squeeze(1)
    return replace(candidates[order], scores=lowered)[above]


@torch.no_grad()
def fuse(
    candidates: Detections, *, score_thresh: float, iou: float, sources: int, most: int
) -> Detections:
    """Weighted box fusion (arXiv 1910.13302): boxes that overlap become one, their weighted mean.

    Best first, each box joins the cluster of its class whose fused box it overlaps most, if their
    IoU is above ``iou``, or begins a new one. The fused box is the mean of its members, weighted
    by their scores, and scores their mean times min(T, N) / N, with T members and N sources: what
    few of the sources saw scores less.

    Args:
        candidates: C, in any order.
        score_thresh: detections score above it, after the fusion.
        iou: see above.
        sources: N, such as the views of test-time augmentation.
        most: detections to return; negative for no limit.

    Returns:
        Best first, without gradients. A detection has the exit stage of its best member.
    """
    _refuse_recording("weighted box fusion")
    candidates = candidates[torch.argsort(candidates.scores, descending=True, stable=True)]
    boxes, classes, scores = candidates.boxes, candidates.classes, candidates.scores
    # Cluster i begins with box i; most rows stay empty.
    fused, sums = torch.zeros_like(boxes), torch.zeros_like(boxes)
    weights, members = torch.zeros_like(scores), torch.zeros_like(scores)
    ones, rows = torch.ones_like(scores), torch.arange(len(candidates), device=boxes.device)
    for i in range(len(candidates)):
        is_open = (members > 0) & (classes == classes[i])
        overlaps = torch.where(is_open, _ious(boxes[i : i + 1], fused), -1.0)  # [C]
        best = overlaps.argmax()[None]
        own = torch.where(overlaps[best] > iou, best, rows[i : i + 1])  # [1]
        sums.index_add_(0, own, boxes[i : i + 1] * scores[i])
        weights.index_add_(0, own, scores[i : i + 1])
        members.index_add_(0, own, ones[:1])
        fused.index_copy_(0, own, sums[own] / weights[own, None])
    means = weights / members.clamp(min=1) * members.clamp(max=sources) / sources
    above = torch.nonzero((members > 0) & (means > score_thresh)).squeeze(1)
    order = above[torch.argsort(means[above], descending=True, stable=True)]
    found = replace(candidates, boxes=fused, scores=means)[order]
    return found if most < 0 else found[slice(most)]


def _ious(box: Tensor, boxes: Tensor) -> Tensor:
    """IoU ``[C]`` of a box ``[1, 4]``; 0 where both are empty."""
    return torch.nan_to_num(box_iou(box, boxes)[0])


def _refuse_recording(name: str) -> None:
    if is_recorded():
        raise ValueError(
            f"{name} cannot be traced or exported: its steps depend on the number of boxes. Set "
            "MODEL.CASCADE.SUPPRESSION to nms."
        )
