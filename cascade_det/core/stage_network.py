"""The stages of a cascade on the features of a batch.

Shapes: R regions of the whole batch, S stages, K foreground classes, C channels, P bins per side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from cascade_det.core.ensemble import ScoreEnsemble
from cascade_det.core.exits.learned import LearnedParts
from cascade_det.core.fast_heads import FastBoxHead
from cascade_det.core.record import RecordedStage
from cascade_det.core.regions import Regions, StageResult
from cascade_det.core.roi_pooling import Pyramid, RoIPooler
from cascade_det.core.structures.boxes import Weights, clip_boxes, decode_boxes, select_class


class StageNetwork:
    """Computes what a ``StageRunner`` asks for.

    Args:
        pyramid: features that ``pooler`` made ready.
        num_images: of the batch.
        pooler: crops regions to ``[R, C, P, P]``.
        crop_pooler: crops proposals to ``[R, C, 1, 1]``.
        box_heads: S modules or more, ``[R, C, P, P]`` to ``[R, F]``.
        box_predictors: likewise, ``[R, F]`` to logits ``[R, K + 1]`` and deltas.
        bbox_reg_weights: S multipliers of (dx, dy, dw, dh).
        ensemble: how the stages' opinions become one score.
        learned: the learned parts of exits, if there are any.
        counts_agreements: whether regions are told how many stages agree on their class.
    """

    def __init__(
        self,
        pyramid: Pyramid,
        num_images: int,
        *,
        pooler: RoIPooler,
        crop_pooler: RoIPooler,
        box_heads: nn.ModuleList,
        box_predictors: nn.ModuleList,
        bbox_reg_weights: Sequence[Weights],
        ensemble: ScoreEnsemble,
        learned: LearnedParts | None,
        counts_agreements: bool,
    ) -> None:
        self.pyramid = pyramid
        self.num_images = num_images
        self.pooler = pooler
        self.crop_pooler = crop_pooler
        self.box_heads = box_heads
        self.box_predictors = box_predictors
        self.bbox_reg_weights = bbox_reg_weights
        self.ensemble = ensemble
        self.learned = learned
        self.counts_agreements = counts_agreements

    def run_stage(self, regions: Regions, stage: int) -> StageResult:
        """Pool, classify and refine the regions that enter a stage."""
        pooled, hidden = self._hidden(regions, stage)
        logits, deltas = self.box_predictors[stage](hidden)
        decoded = decode_boxes(deltas, regions.boxes, self.bbox_reg_weights[stage])
        decoded = clip_boxes(decoded.unflatten(1, (-1, 4)), regions.limits).flatten(1)
        total = self.ensemble.add(regions.total, logits)
        top_class, agreements = self._agreements(regions, total, stage)
        refined = replace(
            regions,
            boxes=select_class(decoded.detach(), logits[:, :-1].argmax(dim=1)),
            boxes_before=regions.boxes,
            total=total,
            top_class=top_class,
            agreements=agreements,
            predicted_ious=self._predicted_ious(hidden, stage),
        )
        return StageResult(refined, decoded, pooled, hidden)

    def _hidden(self, regions: Regions, stage: int) -> tuple[Tensor | None, Tensor]:
        """Crops ``[R, C, P, P]``, if they are of use later, and what a box head makes of them."""
        head, boxes, image_index = self.box_heads[stage], regions.boxes, regions.image_index
        # Crops that nobody asks for need not be in the order of the regions.
        if (
            isinstance(head, FastBoxHead)
            and self.pyramid.table is not None
            and not self.ensemble.reruns_heads
        ):
            rows, order = self.pooler.rows(self.pyramid, boxes, image_index)
            hidden = head.of_rows(rows)
            return None, torch.empty_like(hidden).index_copy_(0, order, hidden)
        pooled = self.pooler(self.pyramid, boxes, image_index)
        return pooled, head(pooled)

    def reported(self, run: StageResult, stage: int) -> Tensor:
        """Class probabilities ``[R, K + 1]`` of regions that leave after ``stage``."""
        if not self.ensemble.reruns_heads:
            return self.ensemble.probs(run.regions.total, stage + 1)
        seen = slice(0, stage + 1)
        heads = zip(self.box_heads[seen], self.box_predictors[seen], strict=True)
        all_probs = [torch.softmax(p(h(run.pooled))[0].float(), dim=1) for h, p in heads]
        return torch.stack(all_probs).mean(dim=0)

    def crops(self, regions: Regions) -> Tensor:
        """The mean feature ``[R, C]`` of each proposal, from the level that it belongs to."""
        pyramid = Pyramid(self.pyramid.features)
        pooled: Tensor = self.crop_pooler(pyramid, regions.boxes, regions.image_index)
        return pooled.flatten(1).float()

    def record(self, regions: Regions, num_stages: int, *, hidden: bool) -> list[RecordedStage]:
        """The outcome of every stage where nobody leaves.

        Args:
            regions: the proposals.
            num_stages: S.
            hidden: whether to keep the outputs of the box heads.
        """
        stages = []
        for stage in range(num_stages):
            run = self.run_stage(regions, stage)
            regions = run.regions
            assert regions.total is not None
            assert regions.agreements is not None
            stages.append(
                RecordedStage(
                    boxes=regions.boxes,
                    decoded=run.decoded,
                    total=regions.total,
                    agreements=regions.agreements,
                    predicted_ious=regions.predicted_ious,
                    reported=self.reported(run, stage) if self.ensemble.reruns_heads else None,
                    hidden=run.hidden if hidden else None,
                )
            )
        return stages

    def _agreements(
        self, regions: Regions, total: Tensor, stage: int
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The most probable class now, and how many stages in a row had it before."""
        if not self.counts_agreements:
            return None, None
        top_class = self.ensemble.probs(total, stage + 1).argmax(dim=1)
        if regions.top_class is None or regions.agreements is None:
            return top_class, torch.zeros_like(top_class)
        return top_class, (regions.agreements + 1) * (regions.top_class == top_class)

    def _predicted_ious(self, hidden: Tensor, stage: int) -> Tensor | None:
        if self.learned is None or "iou_head" not in self.learned.names:
            return None
        return self.learned.predict_ious(stage, hidden)
