"""One training pass of a cascade: run the stages, then sum up their losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cascade_det.core.cascade_targets import CascadeTargets
from cascade_det.core.ensemble import ScoreEnsemble
from cascade_det.core.matching import GroundTruth, LabelledRegions
from cascade_det.core.prefix_loss import prefix_loss
from cascade_det.core.structures.boxes import ImageSizes, image_bounds, is_nonempty
from cascade_det.core.training_schedule import TrainingSchedule
from cascade_det.core.training_stage import TrainingStage

Metrics = dict[str, Tensor]


def cascade_losses(
    run_stage: Callable[[int, LabelledRegions], tuple[Tensor, Tensor]],
    regions: LabelledRegions,
    ground_truth: GroundTruth,
    image_sizes: ImageSizes,
    *,
    targets: CascadeTargets,
    schedule: TrainingSchedule,
    ensemble: ScoreEnsemble,
) -> tuple[Metrics, Metrics]:
    """Losses and metrics of all stages.

    Args:
        run_stage: stage and regions to logits ``[R, K + 1]`` and deltas.
        regions: sampled, and labelled for stage 0.
        ground_truth: objects of the batch.
        image_sizes: N ``(height, width)``.
        targets: as configured.
        schedule: changes them over the training.
        ensemble: combines the class scores of the stages.

    Returns:
        ``loss_cls_stage<s>`` and ``loss_box_reg_stage<s>`` of every stage, and the losses of the
        schedule, ``loss_stage_weights`` and ``loss_prefix``; all scalars. Then metrics to log.
    """
    current = [schedule.current_targets(targets, stage) for stage in range(len(targets.ious))]
    proposal_index = torch.arange(len(regions), device=regions.boxes.device)
    bounds = image_bounds(image_sizes, regions.boxes)  # [N, 4]
    stages: list[TrainingStage] = []
    metrics: Metrics = {}
    for stage, own in enumerate(current):
        logits, deltas = run_stage(stage, regions)
        stages.append(TrainingStage(regions, proposal_index, logits, deltas))
        own_bounds = bounds[regions.image_index]  # [R, 4]
        refined = own.refine(stage, logits, deltas, regions, ground_truth, own_bounds)
        metrics |= own.metrics(stage, logits, regions, refined, len(image_sizes))
        # One index for all fields: every mask would make the CPU wait for the GPU.
        kept = torch.nonzero(is_nonempty(refined.boxes)).squeeze(1)
        regions, proposal_index = refined[kept], proposal_index[kept]
    losses, schedule_metrics = schedule.stage_losses(stages, current)
    metrics |= schedule_metrics
    if schedule.prefix_loss_weight > 0 and schedule.training:
        losses["loss_prefix"] = schedule.prefix_loss_weight * prefix_loss(stages, ensemble)
    if schedule.dynamic is not None and schedule.training:
        metrics |= schedule.dynamic.finish_pass(stages, current, ground_truth, len(image_sizes))
    return losses, metrics
