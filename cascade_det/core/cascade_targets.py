"""Training targets of a cascade: sampling, labels, losses and refinement of its regions.

Shapes: R regions of the whole batch, G ground-truth boxes, S stages, K foreground classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade_det.core.losses import box_loss, classification_loss
from cascade_det.core.matching import (
    GroundTruth,
    LabelledRegions,
    label_regions,
    sample_labels,
)
from cascade_det.core.structures.boxes import (
    Weights,
    clip_boxes,
    decode_boxes,
    flatten_images,
    select_class,
)
from cascade_det.core.structures.on_device import indices_by_group
from cascade_det.core.training_stage import TrainingStage


@dataclass(frozen=True, kw_only=True)
class CascadeTargets:
    """Settings of the training targets; for the fields see ``CascadeHead``."""

    num_classes: int
    ious: tuple[float, ...]
    bbox_reg_weights: tuple[Weights, ...]
    box_reg_loss_type: str
    smooth_l1_beta: float
    box_reg_loss_weight: float
    stage_loss_weights: tuple[float, ...]
    batch_size_per_image: int
    positive_fraction: float
    proposal_append_gt: bool

    def candidates(
        self, proposals: Sequence[Tensor], gt_boxes: Sequence[Tensor], ground_truth: GroundTruth
    ) -> LabelledRegions:
        """Proposals, and ground truth if appended, labelled for stage 0."""
        if self.proposal_append_gt:
            proposals = [torch.cat(pair) for pair in zip(proposals, gt_boxes, strict=True)]
        boxes, image_index = flatten_images(proposals)
        return self._label(boxes, image_index, ground_truth, 0)

    def sample(self, candidates: LabelledRegions, num_images: int) -> LabelledRegions:
        """Sample a minibatch of each image; image by image, positives first."""
        kept = []
        for rows in indices_by_group(candidates.image_index, num_images):  # [R_i]
            positive, negative = sample_labels(
                candidates.gt_classes[rows],
                num_samples=self.batch_size_per_image,
                positive_fraction=self.positive_fraction,
                negative_label=self.num_classes,
            )
            kept += [rows[positive], rows[negative]]
        return candidates[torch.cat(kept)]

    def class_loss(self, stage: int, output: TrainingStage) -> Tensor:
        """Weighted class loss of one stage (arXiv 1712.00726, equation 8)."""
        loss = classification_loss(output.logits, output.regions.gt_classes)
        return self.stage_loss_weights[stage] * loss

    def regression_loss(self, stage: int, output: TrainingStage) -> Tensor:
        """Weighted box loss of the foreground of one stage."""
        rows = self.foreground(output.regions)  # [F]
        foreground = output.regions[rows]
        loss = box_loss(
            select_class(output.deltas[rows], foreground.gt_classes),  # [F, 4]
            foreground.boxes,
            foreground.gt_boxes,
            weights=self.bbox_reg_weights[stage],
            loss_type=self.box_reg_loss_type,
            smooth_l1_beta=self.smooth_l1_beta,
        )
        # Divided by all regions, also background: each foreground box has the same weight
        # however many there are (Fast R-CNN, arXiv 1504.08083, section 2.3).
        loss = loss / max(len(output.regions), 1) * self.box_reg_loss_weight
        return self.stage_loss_weights[stage] * loss

    def foreground(self, regions: LabelledRegions) -> Tensor:
        """int64 ``[F]``: indices of the foreground regions."""
        return torch.nonzero(self._is_foreground(regions)).squeeze(1)

    @torch.no_grad()
    def refine(
        self,
        stage: int,
        logits: Tensor,
        deltas: Tensor,
        regions: LabelledRegions,
        ground_truth: GroundTruth,
        bounds: Tensor,
    ) -> LabelledRegions:
        """The regions with the boxes after a stage, labelled for the next one.

        With class-specific regression a foreground region takes the deltas of its ground-truth
        class, a background region those of its top foreground class.

        Args:
            stage: from 0.
            logits: ``[R, K + 1]``.
            deltas: ``[R, 4]`` or ``[R, 4 K]``.
            regions: labelled for this stage.
            ground_truth: objects of the batch.
            bounds: float32 ``[R, 4]``, the row of ``image_bounds`` for each region.
        """
        top_class = logits[:, :-1].argmax(dim=1)  # [R]
        classes = torch.where(self._is_foreground(regions), regions.gt_classes, top_class)
        boxes = decode_boxes(
            select_class(deltas, classes), regions.boxes, self.bbox_reg_weights[stage]
        )  # [R, 4]
        boxes = clip_boxes(boxes, bounds)
        next_stage = min(stage + 1, len(self.ious) - 1)
        return self._label(boxes, regions.image_index, ground_truth, next_stage)

    @torch.no_grad()
    def metrics(
        self,
        stage: int,
        logits: Tensor,
        regions: LabelledRegions,
        refined: LabelledRegions,
        num_images: int,
    ) -> dict[str, Tensor]:
        """Regions per image, accuracies, and mean IoU before and after the stage; scalars.

        ``nonfinite_boxes`` counts refined boxes with NaN or Inf: training has diverged. Means over
        the foreground are NaN without foreground.
        """
        is_foreground = self._is_foreground(regions)
        foreground = torch.nonzero(is_foreground).squeeze(1)
        correct = logits.argmax(dim=1) == regions.gt_classes
        false_negative = logits.argmax(dim=1) == self.num_classes
        values = {
            "roi_head/num_fg_samples": is_foreground.sum() / num_images,
            "roi_head/num_bg_samples": (~is_foreground).sum() / num_images,
            "fast_rcnn/cls_accuracy": correct.float().mean(),
            "fast_rcnn/fg_cls_accuracy": correct[foreground].float().mean(),
            "fast_rcnn/false_negative": false_negative[foreground].float().mean(),
            "iou_before": regions.ious[foreground].mean(),
            "iou_after": refined.ious[foreground].mean(),
            "nonfinite_boxes": (~refined.boxes.isfinite().all(dim=1)).sum(),
        }
        return {f"stage{stage}/{name}": value for name, value in values.items()}

    def _label(
        self, boxes: Tensor, image_index: Tensor, ground_truth: GroundTruth, stage: int
    ) -> LabelledRegions:
        return label_regions(
            boxes,
            image_index,
            ground_truth,
            iou_threshold=self.ious[stage],
            num_classes=self.num_classes,
        )

    def _is_foreground(self, regions: LabelledRegions) -> Tensor:
        return regions.gt_classes < self.num_classes
