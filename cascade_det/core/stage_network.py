"""Computes the stages of a cascade on the features of a batch.

Shapes: R regions of the whole batch, S stages, K foreground classes, C channels, P bins per side,
F outputs of a box head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cascade_det.core.ensemble import ScoreEnsemble
from cascade_det.core.exits.learned import LearnedParts
from cascade_det.core.fast_heads import FastBoxHead
from cascade_det.core.postprocess import Selection
from cascade_det.core.record import CascadeRecord, RecordedStage
from cascade_det.core.regions import Regions, StageResult
from cascade_det.core.roi_pooling import Pyramid, RoIPooler, in_region_order
from cascade_det.core.structures import ImageSizes
from cascade_det.core.structures.boxes import Weights, clip_boxes, decode_boxes, select_class


@dataclass
class StageNetwork:
    """The stages on one batch: the ``StageSource`` of a real run.

    Args:
        pyramid: features from ``pooler.prepare``.
        image_bounds: float32 ``[N, 4]``, (width, height, width, height) of each image.
        pooler: crops regions to ``[R, C, P, P]``.
        crop_pooler: crops proposals to ``[R, C, 1, 1]``.
        box_heads: at least S modules, ``[R, C, P, P]`` to ``[R, F]``.
        box_predictors: at least S modules, ``[R, F]`` to logits ``[R, K + 1]`` and deltas.
        bbox_reg_weights: S multipliers of (dx, dy, dw, dh).
        ensemble: combines the class scores of the stages.
        learned: the learned parts of the exits, or ``None``.
        counts_agreements: whether to count how many stages agree on the class of a region.
    """

    pyramid: Pyramid
    image_bounds: Tensor
    pooler: RoIPooler
    crop_pooler: RoIPooler
    box_heads: nn.ModuleList
    box_predictors: nn.ModuleList
    bbox_reg_weights: Sequence[Weights]
    ensemble: ScoreEnsemble
    learned: LearnedParts | None
    counts_agreements: bool

    @property
    def num_images(self) -> int:
        """N."""
        return self.image_bounds.shape[0]

    def run_stage(self, regions: Regions, stage: int) -> StageResult:
        """Pool, classify and refine the regions that enter a stage."""
        pooled, hidden = self._run_head(regions, stage)  # hidden: [R, F]
        logits, deltas = self.box_predictors[stage](hidden)  # [R, K + 1], [R, 4] or [R, 4 K]
        decoded = decode_boxes(deltas, regions.boxes, self.bbox_reg_weights[stage])
        bounds = self.image_bounds[regions.image_index]  # [R, 4]
        decoded = clip_boxes(decoded.unflatten(1, (-1, 4)), bounds).flatten(1)
        score_state = self.ensemble.update(regions.score_state, logits)  # [R, K + 1]
        top_class, agreements = self._agreements(regions, score_state, stage)
        refined = replace(
            regions,
            boxes=select_class(decoded.detach(), logits[:, :-1].argmax(dim=1)),
            boxes_before=regions.boxes,
            score_state=score_state,
            top_class=top_class,
            agreements=agreements,
            predicted_ious=self._predicted_ious(hidden, stage),
        )
        return StageResult(refined, decoded, pooled, hidden)

    def final_probs(self, result: StageResult, stage: int) -> Tensor:
        """Class probabilities ``[R, K + 1]`` of regions that exit after ``stage``."""
        return self.ensemble.probs(result.regions.score_state, stage + 1)

    def crops(self, regions: Regions) -> Tensor:
        """Mean feature ``[R, C]`` of each proposal, from its pyramid level."""
        pyramid = replace(self.pyramid, table=None)
        pooled: Tensor = self.crop_pooler(pyramid, regions.boxes, regions.image_index)
        return pooled.flatten(1).float()  # [R, C, 1, 1] to [R, C]

    def record(
        self,
        proposals: Regions,
        image_sizes: ImageSizes,
        selection: Selection,
        *,
        num_stages: int,
        hidden: bool,
    ) -> CascadeRecord:
        """Run every stage on every region.

        Args:
            proposals: of all images.
            image_sizes: N ``(height, width)``.
            selection: of the detections of a replay.
            num_stages: S.
            hidden: whether to keep the outputs of the box heads.
        """
        needs_crops = self.learned is not None and self.learned.crop_channels
        crops = self.crops(proposals) if needs_crops else None
        stages, regions = [], proposals
        for stage in range(num_stages):
            result = self.run_stage(regions, stage)
            stages.append(self._record_stage(result, stage, hidden))
            regions = result.regions
        return CascadeRecord(
            image_sizes=[(int(height), int(width)) for height, width in image_sizes],
            image_index=proposals.image_index,
            proposals=proposals.boxes,
            objectness=proposals.objectness,
            crops=crops,
            stages=stages,
            ensemble=self.ensemble,
            selection=selection,
            pooler=self.pooler,
            pools_whole_maps=self.pyramid.table is None,
        )

    def _record_stage(self, result: StageResult, stage: int, hidden: bool) -> RecordedStage:
        regions = result.regions
        assert regions.score_state is not None
        assert regions.agreements is not None
        return RecordedStage(
            boxes=regions.boxes,
            decoded=result.decoded,
            score_state=regions.score_state,
            agreements=regions.agreements,
            predicted_ious=regions.predicted_ious,
            hidden=result.hidden if hidden else None,
        )

    def _run_head(self, regions: Regions, stage: int) -> tuple[Tensor | None, Tensor]:
        """Crops ``[R, C, P, P]`` if they are needed later, and the box head's ``[R, F]``."""
        head, boxes, image_index = self.box_heads[stage], regions.boxes, regions.image_index
        if isinstance(head, FastBoxHead) and self.pyramid.table is not None:
            rows, order = self.pooler.pool_rows(self.pyramid, boxes, image_index)  # [R, P * P * C]
            hidden = head.forward_rows(rows)
            return None, in_region_order(hidden, order)
        return None, head(self.pooler(self.pyramid, boxes, image_index))

    def _agreements(
        self, regions: Regions, score_state: Tensor, stage: int
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Top class, and the number of consecutive stages before with the same one; ``[R]``."""
        if not self.counts_agreements:
            return None, None
        top_class = self.ensemble.probs(score_state, stage + 1).argmax(dim=1)
        if regions.top_class is None or regions.agreements is None:
            return top_class, torch.zeros_like(top_class)
        return top_class, (regions.agreements + 1) * (regions.top_class == top_class)

    def _predicted_ious(self, hidden: Tensor, stage: int) -> Tensor | None:
        if self.learned is None or "iou_head" not in self.learned.names:
            return None
        return self.learned.predict_ious(stage, hidden)


class LastBoxesNetwork(StageNetwork):
    """The ensemble ``last_boxes``: all heads so far run again on the crops of the exit stage.

    All that this ensemble costs is here: crops are kept, in the order of the regions, and
    every reported region runs through ``stage + 1`` heads once more.
    """

    def final_probs(self, result: StageResult, stage: int) -> Tensor:
        """Mean ``[R, K + 1]`` of the probabilities by heads 0 to ``stage``, on its crops."""
        seen = slice(0, stage + 1)
        heads = zip(self.box_heads[seen], self.box_predictors[seen], strict=True)
        probs = [
            torch.softmax(predictor(head(result.pooled))[0].float(), dim=1)
            for head, predictor in heads
        ]
        return torch.stack(probs).mean(dim=0)  # [S, R, K + 1] to [R, K + 1]

    def _run_head(self, regions: Regions, stage: int) -> tuple[Tensor | None, Tensor]:
        pooled = self.pooler(self.pyramid, regions.boxes, regions.image_index)
        return pooled, self.box_heads[stage](pooled)

    def _record_stage(self, result: StageResult, stage: int, hidden: bool) -> RecordedStage:
        recorded = super()._record_stage(result, stage, hidden)
        return replace(recorded, final_probs=self.final_probs(result, stage))
