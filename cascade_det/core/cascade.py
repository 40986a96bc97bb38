"""The cascade: a sequence of box heads, each on the boxes that the one before refined.

Cascade R-CNN, arXiv 1712.00726. Shapes: N images, R regions of the whole batch (flat, with an
image index), S stages, K foreground classes, background is class K. Boxes are float32 XYXY in
absolute pixels of the resized image; image sizes are ``(height, width)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cascade_det.core.cascade_losses import cascade_losses
from cascade_det.core.cascade_targets import CascadeTargets
from cascade_det.core.ensemble import ScoreEnsemble
from cascade_det.core.exit_losses import exit_losses
from cascade_det.core.exits import ExitPolicy
from cascade_det.core.fast_heads import common_dtype, fast_box_heads
from cascade_det.core.mask_branch import MaskBranch
from cascade_det.core.matching import GroundTruth, LabelledRegions, TrueMasks
from cascade_det.core.modes import in_evaluation_mode
from cascade_det.core.postprocess import Selection, select_detections
from cascade_det.core.record import CascadeRecord
from cascade_det.core.regions import Regions
from cascade_det.core.roi_pooling import Pyramid, RoIPooler
from cascade_det.core.stage_network import LastBoxesNetwork, StageNetwork
from cascade_det.core.stage_outputs import stage_outputs
from cascade_det.core.stage_runner import StageRunner
from cascade_det.core.structures import (
    CascadeInputs,
    CascadeStats,
    Detections,
    ImageSizes,
    PartTimer,
    StageOutput,
    part,
)
from cascade_det.core.structures.boxes import Weights, image_bounds
from cascade_det.core.tile_losses import TileOrigins
from cascade_det.core.training_schedule import TrainingSchedule
from cascade_det.layers.int8 import Grid
from cascade_det.layers.tiles import FeatureMap


class CascadeHead(nn.Module):
    """A cascade of S box heads with early exits.

    Args:
        pooler: crops regions from the feature pyramid; shared by all stages.
        box_heads: S modules, ``[R, C, P, P]`` to ``[R, F]``.
        box_predictors: S modules, ``[R, F]`` to logits ``[R, K + 1]`` and deltas.
        num_classes: K.
        ious: S IoU thresholds of foreground, not decreasing.
        bbox_reg_weights: S multipliers of (dx, dy, dw, dh).
        box_reg_loss_type: one of ``cascade_det.core.losses.BOX_LOSSES``.
        smooth_l1_beta: where smooth L1 turns from quadratic to linear; 0 is L1.
        box_reg_loss_weight: factor of the box loss.
        stage_loss_weights: S factors of the stage losses; ``None`` for 1.
        batch_size_per_image: regions sampled from each image in training.
        positive_fraction: the largest share of foreground among them.
        proposal_append_gt: whether to add the ground truth to the proposals in training.
        ensemble: one of ``cascade_det.core.ensemble.ENSEMBLES``.
        score_thresh: detections score above it.
        nms_thresh: IoU of the per-class NMS.
        detections_per_image: limit per image; negative for none.
        suppression: see ``Selection``, as ``suppression_sigma``.
        exits: the exit policy; ``None`` runs every stage on every region.
        regime: the training schedule; ``None`` for the plain sum of the stage losses.
        masks: the mask heads, with their pooler and rules; ``None`` for no masks.

    Attributes:
        metrics: scalars of the last call of ``losses``, see ``CascadeTargets.metrics``.

    Raises:
        ValueError: if the per-stage arguments differ in length, or the suppression is unknown.
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
        suppression: str = "nms",
        suppression_sigma: float = 0.5,
        exits: ExitPolicy | None = None,
        regime: TrainingSchedule | None = None,
        masks: MaskBranch | None = None,
    ) -> None:
        super().__init__()
        self.num_stages = len(ious)
        stage_loss_weights = stage_loss_weights or [1.0] * self.num_stages
        for name, values in (
            ("box_heads", box_heads),
            ("box_predictors", box_predictors),
            ("bbox_reg_weights", bbox_reg_weights),
            ("stage_loss_weights", stage_loss_weights),
        ):
            if len(values) != self.num_stages:
                raise ValueError(f"{len(values)} {name} for {self.num_stages} ious")
        if exits is not None and exits.num_stages != self.num_stages:
            raise ValueError(f"exits of {exits.num_stages} stages for {self.num_stages} ious")
        self.pooler = pooler
        self.crop_pooler = RoIPooler(
            output_size=1, strides=pooler.strides, sampling_ratio=2, kernel="torchvision"
        )
        self.box_head = nn.ModuleList(box_heads)
        self.box_predictor = nn.ModuleList(box_predictors)
        self.num_classes = num_classes
        self.targets = CascadeTargets(
            num_classes=num_classes,
            ious=tuple(ious),
            bbox_reg_weights=tuple(bbox_reg_weights),
            box_reg_loss_type=box_reg_loss_type,
            smooth_l1_beta=smooth_l1_beta,
            box_reg_loss_weight=box_reg_loss_weight,
            stage_loss_weights=tuple(stage_loss_weights),
            batch_size_per_image=batch_size_per_image,
            positive_fraction=positive_fraction,
            proposal_append_gt=proposal_append_gt,
        )
        self.regime = regime or TrainingSchedule(num_stages=self.num_stages)
        self.ensemble = ScoreEnsemble(ensemble)
        self.selection = Selection(
            score_thresh, nms_thresh, detections_per_image, suppression, suppression_sigma
        )
        self.exits = exits
        self.set_masks(masks)
        self.metrics: dict[str, Tensor] = {}

    def set_masks(self, masks: MaskBranch | None) -> None:
        """Replace the mask heads; ``None`` for no masks."""
        self.masks = masks
        self.mask_head = None if masks is None else masks.head

    def optimize(self, dtype: torch.dtype = torch.float32, grids: Sequence[Grid] = ()) -> None:
        """Replace box and mask heads by fast ones for inference, see ``fast_box_heads``."""
        size = self.pooler.output_size
        self.box_head = fast_box_heads(self.box_head, pooled_size=size, dtype=dtype, grids=grids)
        if self.masks is not None:
            self.set_masks(self.masks.optimized(dtype))

    def losses(
        self,
        features: list[Tensor],
        proposals: Sequence[Tensor],
        gt_boxes: Sequence[Tensor],
        gt_classes: Sequence[Tensor],
        image_sizes: ImageSizes,
        gt_masks: TrueMasks | None = None,
    ) -> dict[str, Tensor]:
        """Losses of all stages; also fills ``metrics``.

        Args:
            features: L maps ``[N, C, H_l, W_l]``, finest first.
            proposals: per image float32 ``[R_i, 4]``.
            gt_boxes: per image float32 ``[G_i, 4]``, none empty; G_i may be 0.
            gt_classes: per image int64 ``[G_i]`` in ``[0, K)``.
            image_sizes: N ``(height, width)``.
            gt_masks: of the objects of all images; ``None`` for no mask losses.

        Returns:
            The scalars of ``cascade_losses``, and ``loss_mask`` or ``loss_mask_stage<s>``.
        """
        ground_truth = GroundTruth.from_images(gt_boxes, gt_classes, gt_masks)
        targets = self.regime.current_targets(self.targets)
        candidates = targets.candidates(proposals, gt_boxes, ground_truth)
        has_objects = ground_truth.images_with_objects(len(image_sizes))
        self.regime.observe_proposals(candidates.ious, candidates.image_index, has_objects)
        regions = targets.sample(candidates, len(image_sizes))
        return self.losses_of_regions(features, regions, ground_truth, image_sizes)

    def losses_of_regions(
        self,
        features: list[Tensor],
        regions: LabelledRegions,
        ground_truth: GroundTruth,
        image_sizes: ImageSizes,
    ) -> dict[str, Tensor]:
        """``losses`` from regions that are already sampled and labelled for stage 0."""
        pyramid = self.pooler.prepare(features)
        entered: list[LabelledRegions] = []

        def run_stage(stage: int, regions: LabelledRegions) -> tuple[Tensor, Tensor]:
            entered.append(regions)
            pooled = self.pooler(pyramid, regions.boxes, regions.image_index)  # [R, C, P, P]
            if pooled.requires_grad:
                # Else the backbone would get the summed gradients of S heads.
                pooled.register_hook(lambda grad: grad * (1.0 / self.num_stages))
            logits, deltas = self.box_predictor[stage](self.box_head[stage](pooled))
            return logits, deltas

        losses, self.metrics = cascade_losses(
            run_stage,
            regions,
            ground_truth,
            image_sizes,
            targets=self.targets,
            schedule=self.regime,
            ensemble=self.ensemble,
        )
        if self.masks is not None and ground_truth.masks is not None:
            own, metrics = self.masks.losses(pyramid, entered, ground_truth, self.targets)
            losses, self.metrics = losses | own, self.metrics | metrics
        return losses

    def exit_losses(
        self,
        inputs: CascadeInputs,
        gt_boxes: Sequence[Tensor],
        gt_classes: Sequence[Tensor],
        origins: TileOrigins | None = None,
    ) -> dict[str, Tensor]:
        """Losses of the learned parts of the exits, see ``core.exit_losses``; empty without such.

        The cascade runs in inference mode and gets no gradients. ``inputs`` have all proposals, not
        sampled, with their objectness. Objects are as in ``losses``. A tile head needs ``origins``.
        """
        learned = None if self.exits is None else self.exits.learned
        if learned is None:
            return {}
        record = self.record(**vars(inputs), hidden=True)
        return exit_losses(learned, record, gt_boxes, gt_classes, origins=origins)

    @in_evaluation_mode
    def detect(
        self,
        features: Sequence[FeatureMap],
        proposals: Sequence[Tensor],
        image_sizes: ImageSizes,
        *,
        objectness: Sequence[Tensor] | None = None,
        timer: PartTimer | None = None,
        started: float | None = None,
        masks: bool = True,
    ) -> tuple[list[Detections], CascadeStats]:
        """Run the cascade; regions that exited are not pooled or computed again.

        The call leaves no state in the module, so threads may share it. Under ``torch.jit.trace``
        every region runs through every stage. With gradients enabled, scores and final boxes have
        gradients; crops and exit decisions do not.

        Args:
            features: L maps ``[N, C, H_l, W_l]``, finest first; the first may be a ``TiledMap``.
            proposals: per image float32 ``[R_i, 4]``, clipped to the image.
            image_sizes: N ``(height, width)``.
            objectness: per image float32 ``[R_i]``, logits of the proposals.
            timer: takes the milliseconds of ``stage<s>``, of the exits in ``gate<g>`` (see
                ``StageRunner``), ``postprocess`` and ``masks`` if given.
            started: when work on the images began, in the seconds of ``now()``; ``None`` for now.
            masks: whether detections get masks, where there are mask heads.

        Returns:
            N ``Detections`` in pixels of the resized images, and the statistics of the call.

        Raises:
            ValueError: the exits need the objectness, and none is given.
        """
        exits, num_images = self.exits, len(image_sizes)
        budget = None if exits is None or torch.jit.is_tracing() else exits.time_budget
        if exits is not None and exits.needs_objectness and objectness is None:
            raise ValueError("the exits need the objectness of the proposals: pass objectness=")
        deadline = None if budget is None else budget.start(num_images, started)
        agreements = exits is not None and exits.needs_agreements
        with part(timer, "stage0"):
            given = features, proposals, objectness, image_sizes
            network, regions = self._prepare(*given, agreements=agreements)
        runner = StageRunner(
            network,
            num_stages=self.num_stages,
            ensemble=self.ensemble,
            policy=exits,
            deadline=deadline,
            timer=timer,
        )
        reported = runner.run(regions)
        device = regions.boxes.device
        if deadline is not None:
            deadline.mark_stages_done(device)
        with part(timer, "postprocess"):
            detections = select_detections(reported, num_images, self.selection)
        if masks and self.masks is not None:
            runner.stats.detected = sum(map(len, detections))
            with part(timer, "masks"):
                detections, runner.stats.masks = self.masks.add(detections, network.pyramid)
        if deadline is not None:
            runner.stats.overrun_ms = deadline.finish(device)
        runner.stats.count_tiles(features[0])
        if timer is not None:
            runner.stats.milliseconds = timer.milliseconds
        return detections, runner.stats

    def now(self) -> float | None:
        """Seconds on the clock of the time budget; ``None`` without a budget."""
        budget = None if self.exits is None else self.exits.time_budget
        return None if budget is None else budget.clock()

    @in_evaluation_mode
    @torch.no_grad()
    def detect_stages(
        self,
        features: Sequence[FeatureMap],
        proposals: Sequence[Tensor],
        image_sizes: ImageSizes,
        *,
        timer: PartTimer | None = None,
    ) -> list[StageOutput]:
        """Run every stage without exits, and select the detections of each.

        Arguments as in ``detect``; the parts of the timer are ``full/stage<s>``, and
        ``full/masks<s>`` where every stage has a mask head: detections have masks only there.
        """
        with part(timer, "full/stage0"):
            network, regions = self._prepare(features, proposals, None, image_sizes)
        return stage_outputs(
            network,
            regions,
            [len(boxes) for boxes in proposals],
            num_stages=self.num_stages,
            selection=self.selection,
            exits=self.exits,
            masks=self.masks,
            timer=timer,
        )

    @in_evaluation_mode
    @torch.no_grad()
    def record(
        self,
        features: Sequence[FeatureMap],
        proposals: Sequence[Tensor],
        image_sizes: ImageSizes,
        *,
        objectness: Sequence[Tensor] | None = None,
        hidden: bool = False,
    ) -> CascadeRecord:
        """Record every region at every stage of the full cascade.

        Arguments as in ``detect``; ``hidden`` also keeps the outputs of the box heads.
        """
        network, regions = self._prepare(
            features, proposals, objectness, image_sizes, agreements=True
        )
        return network.record(
            regions, image_sizes, self.selection, num_stages=self.num_stages, hidden=hidden
        )

    def _prepare(
        self,
        features: Sequence[FeatureMap],
        proposals: Sequence[Tensor],
        objectness: Sequence[Tensor] | None,
        image_sizes: ImageSizes,
        *,
        agreements: bool = False,
    ) -> tuple[StageNetwork, Regions]:
        """The network on the batch, and the proposals as regions."""
        regions = Regions.from_proposals(proposals, objectness)
        bounds = image_bounds(image_sizes, regions.boxes)  # [N, 4]
        return self.network(self.pyramid(features), bounds, agreements=agreements), regions

    def pyramid(self, features: Sequence[FeatureMap]) -> Pyramid:
        """Features ``[N, C, H_l, W_l]`` as inference pools them: in the type of the box heads."""
        return self.pooler.prepare(features, dtype=common_dtype(self.box_head))

    def network(
        self, pyramid: Pyramid, image_bounds: Tensor, *, agreements: bool = False
    ) -> StageNetwork:
        """The stages on a pyramid; see ``StageNetwork``."""
        network = LastBoxesNetwork if self.ensemble.name == "last_boxes" else StageNetwork
        return network(
            pyramid,
            image_bounds,
            pooler=self.pooler,
            crop_pooler=self.crop_pooler,
            box_heads=self.box_head,
            box_predictors=self.box_predictor,
            bbox_reg_weights=self.targets.bbox_reg_weights,
            ensemble=self.ensemble,
            learned=None if self.exits is None else self.exits.learned,
            counts_agreements=agreements,
        )
