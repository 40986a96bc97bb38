"""Training beyond the plain sum of the stage losses: weights and targets that change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascade_det.core.cascade_targets import CascadeTargets
from cascade_det.core.class_losses import ClassLoss
from cascade_det.core.dynamic_targets import DynamicTargets
from cascade_det.core.region_gates import RegionGates
from cascade_det.core.training_stage import TrainingStage

STAGE_WEIGHTINGS = ("fixed", "scheduled", "learned")


class TrainingSchedule(nn.Module):
    """Loss weights of stages and regions, and targets that change over the training.

    In evaluation mode the losses are the plain ones, so validation losses stay comparable over
    the training and between schedules.

    Args:
        num_stages: S.
        class_loss: the class loss of each region; ``None`` for the cross-entropy. As with that,
            the loss of a stage is the mean over its regions.
        gates: weights of the class loss by region and stage; ``None`` for none. The box loss has
            no gates: a region whose class is settled still needs its box refined.
        stage_weighting: "fixed"; "scheduled", linear from the stage weights to
            ``stage_loss_weights_end`` over the training; or "learned": each stage has a
            log-variance s, initially 0, and its losses L become exp(-s) L + s (arXiv 1705.07115,
            with one s for class and box).
        stage_loss_weights_end: S factors for "scheduled", else empty.
        prefix_loss_weight: factor of ``prefix_loss``; 0 leaves it out.
        dynamic: IoU thresholds and betas that follow the training; ``None`` for fixed ones.
        exits_alone: train the learned parts of the exits and nothing else.

    Attributes:
        progress: share of the training that is done, in [0, 1]; set by the training loop.
        log_variances: float32 ``[S]`` if learned, else ``None``.

    Raises:
        ValueError: for an unknown weighting, or end weights that do not fit it.
    """

    def __init__(
        self,
        *,
        num_stages: int,
        class_loss: ClassLoss | None = None,
        gates: RegionGates | None = None,
        stage_weighting: str = "fixed",
        stage_loss_weights_end: Sequence[float] = (),
        prefix_loss_weight: float = 0.0,
        dynamic: DynamicTargets | None = None,
        exits_alone: bool = False,
    ) -> None:
        super().__init__()
        if stage_weighting not in STAGE_WEIGHTINGS:
            known = ", ".join(STAGE_WEIGHTINGS)
            raise ValueError(f"unknown stage weighting {stage_weighting!r}; known: {known}")
        wanted = num_stages if stage_weighting == "scheduled" else 0
        if len(stage_loss_weights_end) != wanted:
            raise ValueError(
                f"{len(stage_loss_weights_end)} stage_loss_weights_end, but stage weighting "
                f"{stage_weighting!r} needs {wanted}"
            )
        self.class_loss = class_loss
        self.gates = gates
        self.stage_loss_weights_end = tuple(stage_loss_weights_end)
        self.prefix_loss_weight = prefix_loss_weight
        self.dynamic = dynamic
        self.exits_alone = exits_alone
        self.progress = 0.0
        self.log_variances: nn.Parameter | None = None
        if stage_weighting == "learned":
            self.log_variances = nn.Parameter(torch.zeros(num_stages))

    def current_targets(self, targets: CascadeTargets, stage: int = 0) -> CascadeTargets:
        """The targets of a stage at this point of the training."""
        if not self.training:
            return targets
        if self.stage_loss_weights_end:
            pairs = zip(targets.stage_loss_weights, self.stage_loss_weights_end, strict=True)
            weights = tuple(start + self.progress * (end - start) for start, end in pairs)
            targets = replace(targets, stage_loss_weights=weights)
        if self.dynamic is not None:
            targets = replace(
                targets,
                ious=self.dynamic.ious(targets.ious),
                smooth_l1_beta=self.dynamic.beta(stage, targets.smooth_l1_beta),
            )
        return targets

    def observe_proposals(self, ious: Tensor, image_index: Tensor, has_objects: Tensor) -> None:
        """See ``DynamicTargets.observe_proposals``."""
        if self.dynamic is not None and self.training:
            self.dynamic.observe_proposals(ious, image_index, has_objects)

    def stage_losses(
        self, stages: Sequence[TrainingStage], targets: Sequence[CascadeTargets]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses by name, and metrics.

        With gates, the class losses of ``RegionGates`` are multiplied by the sum of the stage
        weights: while no region is settled they equal the plain ones (up to the 0.001), and so
        does their balance with the box losses.

        Args:
            stages: S stages.
            targets: S current targets.
        """
        pairs = list(zip(targets, stages, strict=True))
        class_losses, metrics = self._class_losses(stages, targets)
        factors: Sequence[Tensor] = ()
        if self.log_variances is not None and self.training:
            factors = list(torch.exp(-self.log_variances))
        losses: dict[str, Tensor] = {}
        for stage, (own, output) in enumerate(pairs):
            class_loss, box_loss = class_losses[stage], own.regression_loss(stage, output)
            if factors:
                class_loss, box_loss = class_loss * factors[stage], box_loss * factors[stage]
                metrics[f"stage{stage}/loss_factor"] = factors[stage].detach()
            losses[f"loss_cls_stage{stage}"] = class_loss
            losses[f"loss_box_reg_stage{stage}"] = box_loss
        if self.log_variances is not None and self.training:
            losses["loss_stage_weights"] = self.log_variances.sum()
        return losses, metrics

    def _class_losses(
        self, stages: Sequence[TrainingStage], targets: Sequence[CascadeTargets]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Weighted class losses of the stages, and metrics."""
        if not self.training or (self.gates is None and self.class_loss is None):
            pairs = zip(targets, stages, strict=True)
            return [own.class_loss(stage, out) for stage, (own, out) in enumerate(pairs)], {}
        if self.class_loss is None:
            losses = [
                F.cross_entropy(out.logits.float(), out.regions.gt_classes, reduction="none")
                for out in stages
            ]
        else:
            losses = self.class_loss(stages)
        stage_weights = targets[0].stage_loss_weights
        if self.gates is None:
            means = [own.sum() / max(len(own), 1) for own in losses]
            return [w * mean for w, mean in zip(stage_weights, means, strict=True)], {}
        weights, eligible = self.gates.weights(stages, stage_weights)
        scale = sum(stage_weights) / max(len(stages[0].proposal_index), 1)
        metrics = {f"stage{s}/eligible": share.mean() for s, share in enumerate(eligible)}
        return [scale * (w * own).sum() for w, own in zip(weights, losses, strict=True)], metrics


def build_training_schedule(
    *,
    num_stages: int,
    class_loss: Mapping[str, Any] | None = None,
    gating: str | None,
    gate_threshold: float,
    gate_scale: float,
    dynamic: Mapping[str, Any] | None,
    **arguments: Any,
) -> TrainingSchedule:
    """A training schedule from plain values.

    Args:
        num_stages: S.
        class_loss: arguments of ``ClassLoss`` without ``num_stages``, or ``None``.
        gating: kind of ``RegionGates``, or ``None``.
        gate_threshold: threshold of ``RegionGates``.
        gate_scale: scale of ``RegionGates``.
        dynamic: arguments of ``DynamicTargets`` without ``num_stages``, or ``None``.
        arguments: further arguments of ``TrainingSchedule``.
    """
    gates = None
    if gating is not None:
        gates = RegionGates(gating, threshold=gate_threshold, scale=gate_scale)
    return TrainingSchedule(
        num_stages=num_stages,
        class_loss=None if class_loss is None else ClassLoss(num_stages=num_stages, **class_loss),
        gates=gates,
        dynamic=None if dynamic is None else DynamicTargets(num_stages=num_stages, **dynamic),
        **arguments,
    )
