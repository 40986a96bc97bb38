"""Masks of a cascade: their losses, and the masks of its detections.

Shapes: F foreground regions, D detections, M cells per side of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou

from cascade_det.core.cascade_targets import CascadeTargets
from cascade_det.core.fast_masks import FastMaskHead, fast_mask_heads
from cascade_det.core.matching import GroundTruth, LabelledRegions
from cascade_det.core.roi_pooling import Pyramid, RoIPooler, in_region_order
from cascade_det.core.structures import Detections
from cascade_det.core.structures.boxes import flatten_images


@dataclass(frozen=True, kw_only=True)
class MaskRules:
    """Which detections get a mask.

    Attributes:
        score_threshold: those that score at least this.
        redundancy_iou: those whose IoU with every better detection of the image is below this;
            ``None`` for all.
    """

    score_threshold: float = 0.0
    redundancy_iou: float | None = None

    def chosen(self, detections: Detections) -> Tensor:
        """Bool ``[D]``, from the detections of one image, best score first."""
        chosen = detections.scores >= self.score_threshold
        if self.redundancy_iou is not None:
            overlaps = box_iou(detections.boxes, detections.boxes).tril(diagonal=-1)  # [D, D]
            chosen = chosen & (overlaps < self.redundancy_iou).all(dim=1)
        return chosen


@dataclass(frozen=True)
class MaskBranch:
    """Mask heads on crops of the pyramid.

    Attributes:
        head: ``[R, C, P, P]`` and classes ``[R]`` to logits ``[R, M, M]``, or an ``nn.ModuleList``
            of one such head per stage.
        pooler: crops regions to ``[R, C, P, P]``.
        rules: which detections get a mask.
    """

    head: nn.Module
    pooler: RoIPooler
    rules: MaskRules = MaskRules()

    @property
    def per_stage(self) -> bool:
        """Whether every stage has a head."""
        return isinstance(self.head, nn.ModuleList)

    @property
    def heads(self) -> list[nn.Module]:
        """The head, or those of the stages."""
        return list(self.head) if isinstance(self.head, nn.ModuleList) else [self.head]

    def optimized(self, dtype: torch.dtype) -> MaskBranch:
        """The same with fast heads for inference, see ``fast_mask_heads``."""
        return self.with_heads(fast_mask_heads(self.heads, dtype=dtype))

    def with_heads(self, heads: nn.ModuleList) -> MaskBranch:
        """The same with as many other heads."""
        return replace(self, head=heads if self.per_stage else heads[0])

    def losses(
        self,
        pyramid: Pyramid,
        entered: Sequence[LabelledRegions],
        truth: GroundTruth,
        targets: CascadeTargets,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses and metrics of all heads.

        Args:
            pyramid: from the ``prepare`` of a pooler.
            entered: of each stage, the labelled regions that entered it.
            truth: objects of the batch, with masks.
            targets: of the cascade.

        Returns:
            ``loss_mask``, of the foreground of stage 0, or ``loss_mask_stage<s>``, of that of each
            stage, with its loss weight; then metrics to log. All scalars.
        """
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        for stage, head in enumerate(self.heads):
            regions = entered[stage][targets.foreground(entered[stage])]
            loss, found = self._loss(head, pyramid, regions, truth)
            name, prefix = "loss_mask", ""
            if self.per_stage:
                name, prefix = f"loss_mask_stage{stage}", f"stage{stage}/"
                loss = targets.stage_loss_weights[stage] * loss
            losses[name] = loss
            metrics |= {f"{prefix}{key}": value for key, value in found.items()}
        return losses, metrics

    def _loss(
        self, head: nn.Module, pyramid: Pyramid, regions: LabelledRegions, truth: GroundTruth
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Binary cross-entropy of the true class's mask, and metrics.

        The mean over all cells of all foreground regions whose object has a mask (arXiv
        1703.06870, section 3); 0, with a graph, without any.
        """
        assert truth.masks is not None
        regions = regions[torch.nonzero(truth.masks.known[regions.gt_index]).squeeze(1)]
        pooled = self.pooler(pyramid, regions.boxes, regions.image_index)
        logits = head(pooled, regions.gt_classes)  # [F, M, M]
        if len(regions) == 0:
            return logits.sum() * 0.0, {}
        targets = truth.masks.crop(regions.gt_index, regions.boxes, logits.shape[-1])
        loss = F.binary_cross_entropy_with_logits(logits, targets.float())
        return loss, _metrics(logits.detach() > 0, targets)

    def add(
        self, detections: Sequence[Detections], pyramid: Pyramid, stages: int | None = None
    ) -> tuple[list[Detections], int]:
        """The detections with their masks, and how many got one by the rules.

        A mask depends on its box, class and the features alone.

        Args:
            detections: of each image, in pixels of the features' images.
            pyramid: from the ``prepare`` of a pooler.
            stages: of heads per stage, how many of the first ones; ``None`` for all.
        """
        chosen = [torch.nonzero(self.rules.chosen(d)).squeeze(1) for d in detections]
        pairs = list(zip(detections, chosen, strict=True))
        boxes, image_index = flatten_images([d.boxes[rows] for d, rows in pairs])
        classes = torch.cat([d.classes[rows] for d, rows in pairs])
        made = self.probabilities(pyramid, boxes, image_index, classes, stages=stages)
        masked = []
        for (own, rows), masks in zip(pairs, made.split([len(r) for r in chosen]), strict=True):
            if len(rows) < len(own):
                masks = masks.new_zeros(len(own), *masks.shape[1:]).index_copy_(0, rows, masks)
            masked.append(replace(own, masks=masks))
        return masked, len(boxes)

    def probabilities(
        self,
        pyramid: Pyramid,
        boxes: Tensor,
        image_index: Tensor,
        classes: Tensor,
        *,
        stages: int | None = None,
    ) -> Tensor:
        """Masks of regions: float32 ``[R, M, M]`` in [0, 1]; arguments as of ``add``, ``[R]``."""
        heads = self.heads[:stages]
        fast = [head for head in heads if isinstance(head, FastMaskHead)]
        if pyramid.table is not None and len(fast) == len(heads):
            rows, order = self.pooler.pool_rows(pyramid, boxes, image_index)  # [R, P * P * C]
            own = classes if order is None else classes[order]
            masks = _mean_probs([head.forward_rows(rows, own) for head in fast])
            return in_region_order(masks, order)
        pooled = self.pooler(pyramid, boxes, image_index)  # [R, C, P, P]
        return _mean_probs([head(pooled.to(_dtype(head, pooled.dtype)), classes) for head in heads])


def _dtype(head: nn.Module, default: torch.dtype) -> torch.dtype:
    """That of its weights: fast box heads may have the maps pooled in another one."""
    return next((weight.dtype for weight in head.parameters()), default)


def _mean_probs(logits: list[Tensor]) -> Tensor:
    """Mean probabilities ``[R, M, M]`` of the logits of each head."""
    probs = [x.sigmoid() for x in logits]
    return torch.stack(probs).mean(dim=0) if len(probs) > 1 else probs[0]


def _metrics(predicted: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Detectron2's metrics of masks ``[F, M, M]``; scalars."""
    wrong, positive = predicted != targets, targets.sum()
    return {
        "mask_rcnn/accuracy": 1 - wrong.float().mean(),
        "mask_rcnn/false_positive": (wrong & ~targets).sum()
        / (targets.numel() - positive).clamp(min=1),
        "mask_rcnn/false_negative": (wrong & targets).sum() / positive.clamp(min=1),
    }
