"""The cascade: a sequence of box heads, each trained on and run from the boxes of the last.

Cascade R-CNN, arXiv 1712.00726. Shapes: N images, R regions of the whole batch (flat, with an
image index), S stages, K foreground classes, background is class K. Boxes are float32 XYXY in
absolute pixels of the resized image; image sizes are ``(height, width)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from cascade_det.core import exits as exit_codes
from cascade_det.core.boxes import (
    Weights,
    clip_boxes,
    decode_boxes,
    flatten_images,
    image_limits,
    is_nonempty,
    select_class,
)
from cascade_det.core.ensemble import ScoreEnsemble
from cascade_det.core.exits import ConfidenceExit
from cascade_det.core.matching import LabelledRegions, Targets
from cascade_det.core.postprocess import select_detections
from cascade_det.core.regions import Regions, Scored
from cascade_det.core.roi_pooling import Pyramid, RoIPooler
from cascade_det.core.structures import (
    EXIT_REASONS,
    CascadeStats,
    Detections,
    PartTimer,
    StageOutput,
)
from cascade_det.core.training import TrainingRules

ImageSizes = Sequence[tuple[int, int]]


class CascadeHead(nn.Module):
    """Three (or any number of) box heads in a row, with exits.

    Args:
        pooler: crops regions from the feature pyramid, shared by the stages.
        box_heads: S modules, ``[R, C, P, P]`` to ``[R, F]``.
        box_predictors: S modules, ``[R, F]`` to logits ``[R, K + 1]`` and deltas.
        num_classes: K.
        ious: S matching thresholds, not falling.
        bbox_reg_weights: S multipliers of (dx, dy, dw, dh).
        box_reg_loss_type: one of ``cascade_det.core.losses.BOX_LOSSES``.
        smooth_l1_beta: of the smooth L1 loss; 0 is L1.
        box_reg_loss_weight: factor of the box loss.
        stage_loss_weights: S factors of the losses of a stage.
        batch_size_per_image: regions sampled for training from each image.
        positive_fraction: the largest share of foreground among them.
        proposal_append_gt: whether ground truth joins the proposals in training.
        ensemble: one of ``cascade_det.core.ensemble.ENSEMBLES``.
        score_thresh: of the detections.
        nms_thresh: of the per-class NMS.
        detections_per_image: the most to return.
        exits: when regions leave early; ``None`` runs every stage on every region.

    Raises:
        ValueError: if the per-stage arguments differ in length.
    """

    def __init__(
        self,
        *,
        pooler: RoIPooler,
        box_heads: Sequence[nn.Module],
        box_predictors: Sequence[nn.Module],
        num_classes: int,
        ious: Sequence[float],
        bbox_reg_weights: Sequence[Weights],
        box_reg_loss_type: str = "smooth_l1",
        smooth_l1_beta: float = 0.0,
        box_reg_loss_weight: float = 1.0,
        stage_loss_weights: Sequence[float] | None = None,
        batch_size_per_image: int = 512,
        positive_fraction: float = 0.25,
        proposal_append_gt: bool = True,
        ensemble: str = "mean_probs",
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        detections_per_image: int = 100,
        exits: ConfidenceExit | None = None,
    ) -> None:
        super().__init__()
        self.num_stages = len(ious)
        stage_loss_weights = stage_loss_weights or [1.0] * self.num_stages
        per_stage = {
            "box_heads": box_heads,
            "box_predictors": box_predictors,
            "bbox_reg_weights": bbox_reg_weights,
            "stage_loss_weights": stage_loss_weights,
        }
        for name, values in per_stage.items():
            if len(values) != self.num_stages:
                raise ValueError(f"{len(values)} {name} for {self.num_stages} ious")
        if exits is not None and len(exits.thresholds) != self.num_stages - 1:
            raise ValueError(
                f"{len(exits.thresholds)} exit thresholds for {self.num_stages} stages: "
                "one is needed for each stage but the last"
            )
        self.pooler = pooler
        self.box_head = nn.ModuleList(box_heads)
        self.box_predictor = nn.ModuleList(box_predictors)
        self.num_classes = num_classes
        self.bbox_reg_weights = tuple(bbox_reg_weights)
        self.training_rules = TrainingRules(
            num_classes=num_classes,
            ious=tuple(ious),
            bbox_reg_weights=self.bbox_reg_weights,
            box_reg_loss_type=box_reg_loss_type,
            smooth_l1_beta=smooth_l1_beta,
            box_reg_loss_weight=box_reg_loss_weight,
            stage_loss_weights=tuple(stage_loss_weights),
            batch_size_per_image=batch_size_per_image,
            positive_fraction=positive_fraction,
            proposal_append_gt=proposal_append_gt,
        )
        self.ensemble = ScoreEnsemble(ensemble)
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.detections_per_image = detections_per_image
        self.exits = exits
        self.metrics: dict[str, Tensor] = {}

    def losses(
        self,
        features: list[Tensor],
        proposals: Sequence[Tensor],
        gt_boxes: Sequence[Tensor],
        gt_classes: Sequence[Tensor],
        image_sizes: ImageSizes,
    ) -> dict[str, Tensor]:
        """Losses of all stages; also fills ``metrics``.

        Args:
            features: L maps ``[N, C, H_l, W_l]``, finest first.
            proposals: per image float32 ``[R_i, 4]``.
            gt_boxes: per image float32 ``[G_i, 4]``, none empty; G_i may be 0.
            gt_classes: per image int64 ``[G_i]`` in ``[0, K)``.
            image_sizes: N ``(height, width)``.

        Returns:
            ``loss_cls_stage<s>`` and ``loss_box_reg_stage<s>`` for every stage, scalars.
        """
        boxes, image_index = flatten_images(gt_boxes)
        targets = Targets(boxes, torch.cat(list(gt_classes)), image_index)
        regions = self.training_rules.sample(proposals, gt_boxes, targets)
        return self.losses_of_regions(features, regions, targets, image_sizes)

    def losses_of_regions(
        self,
        features: list[Tensor],
        regions: LabelledRegions,
        targets: Targets,
        image_sizes: ImageSizes,
    ) -> dict[str, Tensor]:
        """Losses of all stages from regions that are already sampled and labelled for stage 0."""
        pyramid = self.pooler.prepare(features)
        losses: dict[str, Tensor] = {}
        self.metrics = {}
        for stage in range(self.num_stages):
            pooled = self.pooler(pyramid, regions.boxes, regions.image_index)
            if pooled.requires_grad:
                # The sum of S losses would train the backbone S times as fast as one head does.
                pooled.register_hook(lambda grad: grad * (1.0 / self.num_stages))
            logits, deltas = self.box_predictor[stage](self.box_head[stage](pooled))
            losses.update(self.training_rules.stage_losses(stage, logits, deltas, regions))
            refined = self.training_rules.refine(
                stage,
                logits,
                deltas,
                regions,
                targets,
                image_limits(image_sizes, regions.image_index),
            )
            self.metrics |= self.training_rules.metrics(
                stage, logits, regions, refined, len(image_sizes)
            )
            regions = refined[is_nonempty(refined.boxes)]
        return losses

    def detect(
        self,
        features: list[Tensor],
        proposals: Sequence[Tensor],
        image_sizes: ImageSizes,
        *,
        timer: PartTimer | None = None,
    ) -> tuple[list[Detections], CascadeStats]:
        """Run the cascade; regions that left are neither pooled nor computed again.

        Under ``torch.jit.trace`` every region sees every stage. Where gradients are on, scores and
        final boxes have them; what a stage crops and who leaves does not.

        Args:
            features: L maps ``[N, C, H_l, W_l]``, finest first.
            proposals: per image float32 ``[R_i, 4]``, clipped to the image.
            image_sizes: N ``(height, width)``.
            timer: takes the milliseconds of ``stage<s>`` and ``postprocess`` if given.

        Returns:
            N ``Detections`` in pixels of the resized images, and what was done.
        """
        stats = CascadeStats([0] * self.num_stages, [{} for _ in range(self.num_stages)])
        left: list[Scored] = []
        with _part(timer, "stage0"):
            pyramid, live = self._start(features, proposals, image_sizes)
        for stage in range(self.num_stages):
            # A tracer would leave the stages out for all inputs.
            if len(live) == 0 and not torch.jit.is_tracing():
                break
            stats.entered[stage] = len(live)
            with _part(timer, f"stage{stage}"):
                live, leaving, stats.left[stage] = self._advance(pyramid, live, stage)
            if leaving is not None:
                left.append(leaving)
        with _part(timer, "postprocess"):
            detections = self._select(left, live, len(image_sizes))
        if timer is not None:
            stats.milliseconds = timer.milliseconds
        return detections, stats

    @torch.no_grad()
    def detect_stages(
        self,
        features: list[Tensor],
        proposals: Sequence[Tensor],
        image_sizes: ImageSizes,
        *,
        timer: PartTimer | None = None,
    ) -> list[StageOutput]:
        """The full cascade without exits, and what it would return if it stopped at each stage.

        Arguments as in ``detect``; the timer's parts are ``full/stage<s>``.
        """
        with _part(timer, "full/stage0"):
            pyramid, regions = self._start(features, proposals, image_sizes)
        counts = [len(p) for p in proposals]
        outputs = []
        for stage in range(self.num_stages):
            before = regions.boxes
            with _part(timer, f"full/stage{stage}"):
                regions, pooled, decoded = self._run_stage(pyramid, regions, stage)
            scored = self._score(regions, pooled, decoded, stage)
            outputs.append(
                StageOutput(
                    self._select([scored], regions, len(image_sizes)),
                    list(before.split(counts)),
                    list(regions.boxes.split(counts)),
                )
            )
        return outputs

    def _start(
        self, features: list[Tensor], proposals: Sequence[Tensor], image_sizes: ImageSizes
    ) -> tuple[Pyramid, Regions]:
        boxes, image_index = flatten_images(proposals)
        limits = image_limits(image_sizes, image_index)
        return self.pooler.prepare(features), Regions(boxes, image_index, limits)

    def _advance(
        self, pyramid: Pyramid, live: Regions, stage: int
    ) -> tuple[Regions, Scored | None, dict[str, int]]:
        """One stage: who goes on, who leaves with a score, and how many left for which reason."""
        live, pooled, decoded = self._run_stage(pyramid, live, stage)
        if stage == self.num_stages - 1:
            completed = {"completed": len(live)}
            return live[:0], self._score(live, pooled, decoded, stage), completed
        # Who leaves depends on the input: a tracer could not record it.
        if self.exits is None or torch.jit.is_tracing():
            return live, None, {}
        reasons = self.exits.decide(stage, self.ensemble.probs(live.total, stage + 1))
        # One synchronisation tells all counts; a stable sort by reason then makes every group
        # a slice, in the order in which the regions came.
        counts = torch.bincount(reasons - exit_codes.STAY, minlength=len(EXIT_REASONS) + 1).tolist()
        groups = torch.argsort(reasons, stable=True).split(counts)
        kept = torch.cat(
            [group for i, group in enumerate(groups[1:]) if i != exit_codes.BACKGROUND]
        )
        # Crops are many numbers for each region: they are gathered only where they are used.
        crops = pooled[kept] if self.ensemble.reruns_heads else pooled
        leaving = self._score(live[kept], crops, decoded[kept], stage)
        by_reason = {name: n for name, n in zip(EXIT_REASONS, counts[1:], strict=True) if n}
        return live[groups[0]], leaving, by_reason

    def _run_stage(
        self, pyramid: Pyramid, regions: Regions, stage: int
    ) -> tuple[Regions, Tensor, Tensor]:
        """Pool, classify and refine: the refined regions, their crops, and all decoded boxes."""
        pooled = self.pooler(pyramid, regions.boxes, regions.image_index)
        logits, deltas = self.box_predictor[stage](self.box_head[stage](pooled))
        decoded = decode_boxes(deltas, regions.boxes, self.bbox_reg_weights[stage])
        decoded = clip_boxes(decoded.unflatten(1, (-1, 4)), regions.limits).flatten(1)
        boxes = select_class(decoded.detach(), logits[:, :-1].argmax(dim=1))
        total = self.ensemble.add(regions.total, logits)
        return Regions(boxes, regions.image_index, regions.limits, total), pooled, decoded

    def _score(self, regions: Regions, pooled: Tensor, decoded: Tensor, stage: int) -> Scored:
        """What regions are reported as if they leave after ``stage``."""
        if self.ensemble.reruns_heads:
            heads = zip(self.box_head[: stage + 1], self.box_predictor[: stage + 1], strict=True)
            all_probs = [torch.softmax(p(h(pooled))[0].float(), dim=1) for h, p in heads]
            probs = torch.stack(all_probs).mean(dim=0)
        else:
            probs = self.ensemble.probs(regions.total, stage + 1)
        stages = torch.full_like(regions.image_index, stage)
        return Scored(decoded, probs, regions.image_index, stages)

    def _select(self, scored: list[Scored], rest: Regions, num_images: int) -> list[Detections]:
        if not scored:
            device = rest.boxes.device
            none = torch.zeros(0, dtype=torch.int64, device=device)
            boxes, probs = rest.boxes[:0], rest.boxes.new_zeros(0, self.num_classes + 1)
            scored = [Scored(boxes, probs, none, none)]
        return select_detections(
            torch.cat([s.boxes for s in scored]),
            torch.cat([s.probs for s in scored]),
            torch.cat([s.image_index for s in scored]),
            torch.cat([s.exit_stages for s in scored]),
            num_images=num_images,
            score_thresh=self.score_thresh,
            nms_thresh=self.nms_thresh,
            detections_per_image=self.detections_per_image,
        )


def _part(timer: PartTimer | None, name: str) -> AbstractContextManager[None]:
    return nullcontext() if timer is None else timer.part(name)
