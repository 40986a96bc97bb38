"""One training pass of a cascade: stage after stage, then the losses of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cascade_det.core.cascade_targets import CascadeTargets
from cascade_det.core.ensemble import ScoreEnsemble
from cascade_det.core.matching import LabelledRegions, Targets
from cascade_det.core.prefix_loss import prefix_loss
from cascade_det.core.structures.boxes import image_bounds, is_nonempty
from cascade_det.core.training_schedule import TrainingSchedule
from cascade_det.core.training_stage import TrainingStage

Metrics = dict[str, Tensor]


def cascade_losses(
    run_stage: Callable[[int, LabelledRegions], tuple[Tensor, Tensor]],
    regions: LabelledRegions,
    targets: Targets,
    image_sizes: Sequence[tuple[int, int]],
    *,
    rules: CascadeTargets,
    regime: TrainingSchedule,
    ensemble: ScoreEnsemble,
) -> tuple[Metrics, Metrics]:
    """Losses and metrics of all stages.

    Args:
        run_stage: gives logits ``[R, K + 1]`` and deltas of a stage for regions.
        regions: sampled, and labelled for stage 0.
        targets: ground truth of the batch.
        image_sizes: N ``(height, width)``.
        rules: as configured.
        regime: what is made of them.
        ensemble: how the stages' opinions become one score.

    Returns:
        ``loss_cls_stage<s>`` and ``loss_box_reg_stage<s>`` for every stage, and what the regime
        adds: ``loss_stage_weights``, ``loss_prefix``; all scalars. And what to watch.
    """
    of_stage = [regime.rules(rules, stage) for stage in range(len(rules.ious))]
    rows = torch.arange(len(regions), device=regions.boxes.device)
    limits = image_bounds(image_sizes, torch.arange(len(image_sizes), device=rows.device))
    passes: list[TrainingStage] = []
    metrics: Metrics = {}
    for stage, now in enumerate(of_stage):
        logits, deltas = run_stage(stage, regions)
        passes.append(TrainingStage(regions, rows, logits, deltas))
        own_limits = limits[regions.image_index]
        refined = now.refine(stage, logits, deltas, regions, targets, own_limits)
        metrics |= now.metrics(stage, logits, regions, refined, len(image_sizes))
        # Rows, not a mask: a GPU would be waited for wherever a mask picks rows.
        kept = torch.nonzero(is_nonempty(refined.boxes)).squeeze(1)
        regions, rows = refined[kept], rows[kept]
    losses, more = regime.stage_losses(passes, of_stage)
    metrics |= more
    if regime.prefix_loss_weight > 0 and regime.training:
        losses["loss_prefix"] = regime.prefix_loss_weight * prefix_loss(passes, ensemble)
    if regime.dynamic is not None and regime.training:
        metrics |= regime.dynamic.finish_pass(passes, of_stage, targets, len(image_sizes))
    return losses, metrics
