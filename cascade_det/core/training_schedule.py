"""How a cascade is trained beyond the plain sum of its stages' losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cascade_det.core.cascade_targets import CascadeTargets
from cascade_det.core.dynamic_targets import DynamicTargets
from cascade_det.core.losses import weighted_classification_loss
from cascade_det.core.region_gates import RegionGates
from cascade_det.core.training_stage import TrainingStage

STAGE_WEIGHTINGS = ("fixed", "scheduled", "learned")


class TrainingSchedule(nn.Module):
    """Weights of stages and regions in the losses of a cascade, and targets that change.

    In evaluation mode a regime is idle: the losses are the plain ones, so that those on
    validation data mean the same throughout a training, and for every regime.

    Args:
        num_stages: S.
        gates: which stages teach a region its class; ``None`` for all. The box loss has no gates:
            they look at the class alone, and a region whose class is settled still has a box to
            be refined.
        stage_weighting: "fixed"; "scheduled", linearly from the stage weights to
            ``stage_loss_weights_end`` over the training; or "learned", a log-variance s for each
            stage, 0 at first, by which its losses L become exp(-s) L + s (arXiv 1705.07115, with
            one s for class and box).
        stage_loss_weights_end: S factors, of "scheduled" alone.
        prefix_loss_weight: factor of ``prefix_loss``; 0 leaves it out.
        dynamic: IoU thresholds and betas that follow the training; ``None`` for fixed ones.
        exits_alone: whether only the learned parts of exits are trained, and nothing else has a
            loss.

    Attributes:
        progress: share of the training that is done, in [0, 1]. Whoever trains sets it.
        log_variances: float32 ``[S]``, where they are learned.

    Raises:
        ValueError: an unknown weighting, or end weights that do not fit it.
    """

    def __init__(
        self,
        *,
        num_stages: int,
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
        self.gates = gates
        self.stage_loss_weights_end = tuple(stage_loss_weights_end)
        self.prefix_loss_weight = prefix_loss_weight
        self.dynamic = dynamic
        self.exits_alone = exits_alone
        self.progress = 0.0
        self.log_variances: nn.Parameter | None = None
        if stage_weighting == "learned":
            self.log_variances = nn.Parameter(torch.zeros(num_stages))

    def rules(self, rules: CascadeTargets, stage: int = 0) -> CascadeTargets:
        """The rules that hold for a stage now, in the place of those that were configured."""
        if not self.training:
            return rules
        if self.stage_loss_weights_end:
            pairs = zip(rules.stage_loss_weights, self.stage_loss_weights_end, strict=True)
            now = tuple(start + self.progress * (end - start) for start, end in pairs)
            rules = replace(rules, stage_loss_weights=now)
        if self.dynamic is not None:
            rules = replace(
                rules,
                ious=self.dynamic.ious(rules.ious),
                smooth_l1_beta=self.dynamic.beta(stage, rules.smooth_l1_beta),
            )
        return rules

    def observe_proposals(self, ious: Tensor, image_index: Tensor, has_objects: Tensor) -> None:
        """See ``DynamicTargets.observe_proposals``."""
        if self.dynamic is not None and self.training:
            self.dynamic.observe_proposals(ious, image_index, has_objects)

    def stage_losses(
        self, passes: Sequence[TrainingStage], rules: Sequence[CascadeTargets]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses by name, and metrics.

        Under gates the class losses are those of ``RegionGates``, multiplied by the sum of the
        stage weights: as long as no region is settled they are the plain ones, up to the smallest
        weight, and so is their balance with the box losses.

        Args:
            passes: of S stages.
            rules: of S stages, from ``rules``.
        """
        stages = list(zip(rules, passes, strict=True))
        metrics: dict[str, Tensor] = {}
        if self.gates is not None and self.training:
            class_losses, metrics = self._gated_class_losses(self.gates, passes, rules[0])
        else:
            class_losses = [r.class_loss(stage, run) for stage, (r, run) in enumerate(stages)]
        factors: Sequence[Tensor] = ()
        if self.log_variances is not None and self.training:
            factors = list(torch.exp(-self.log_variances))
        losses: dict[str, Tensor] = {}
        for stage, (of_stage, run) in enumerate(stages):
            pair = class_losses[stage], of_stage.regression_loss(stage, run)
            if factors:
                pair = pair[0] * factors[stage], pair[1] * factors[stage]
                metrics[f"stage{stage}/loss_factor"] = factors[stage].detach()
            losses[f"loss_cls_stage{stage}"], losses[f"loss_box_reg_stage{stage}"] = pair
        if self.log_variances is not None and self.training:
            losses["loss_stage_weights"] = self.log_variances.sum()
        return losses, metrics

    @staticmethod
    def _gated_class_losses(
        gates: RegionGates, passes: Sequence[TrainingStage], rules: CascadeTargets
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        weights, eligible = gates.weights(passes, rules.stage_loss_weights)
        scale = sum(rules.stage_loss_weights) / max(len(passes[0].rows), 1)
        losses = [
            scale * weighted_classification_loss(run.logits, run.regions.gt_classes, weight)
            for run, weight in zip(passes, weights, strict=True)
        ]
        return losses, {f"stage{s}/eligible": share.mean() for s, share in enumerate(eligible)}


def build_training_schedule(
    *,
    num_stages: int,
    gating: str | None,
    gate_threshold: float,
    gate_scale: float,
    dynamic: Mapping[str, Any] | None,
    **arguments: Any,
) -> TrainingSchedule:
    """A regime from plain values.

    Args:
        num_stages: S.
        gating: one of ``GATES``, or ``None``.
        gate_threshold: see ``RegionGates``.
        gate_scale: likewise.
        dynamic: arguments of ``DynamicTargets`` but for the first, or ``None``.
        arguments: further ones of ``TrainingSchedule``.
    """
    gates = None
    if gating is not None:
        gates = RegionGates(gating, threshold=gate_threshold, scale=gate_scale)
    return TrainingSchedule(
        num_stages=num_stages,
        gates=gates,
        dynamic=None if dynamic is None else DynamicTargets(num_stages=num_stages, **dynamic),
        **arguments,
    )
