"""Confidence-gated training: weights of the class loss by region and stage.

Shapes: S stages, R_s regions that reached stage s, K foreground classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cascade_det.core.training_stage import TrainingStage

GATES = ("hard", "soft")
# Before normalisation, so that every stage still trains on every region.
_MIN_WEIGHT = 1e-3


class RegionGates:
    """Class-loss weights by region and stage (arXiv 2509.17885, with regions for samples).

    A stage trains on a region to the extent that earlier stages have not settled it. With p_k, the
    softmax of stage k, and y_k, the label at its IoU threshold (background included), the stage
    settles a region by

    - "hard": 1 if max p_k >= threshold and argmax p_k = y_k, else 0;
    - "soft": sigmoid(scale (p_k(y_k) - threshold)).

    Eligibility is the product of (1 - settled) over the stages before, 1 at stage 0. The weights
    are stage weight x eligibility + 0.001, normalised to a sum of 1 over the stages that the
    region reached. They carry no gradient.

    At the scale of 1 of the paper's repository and a threshold of 0.9, (1 - settled) lies between
    0.48 and 0.71 for every p: nearly constant. A scale of about 15 makes it a gate.

    Args:
        kind: one of ``GATES``.
        threshold: in (0, 1].
        scale: of "soft".

    Raises:
        ValueError: for an unknown kind.
    """

    def __init__(self, kind: str, *, threshold: float, scale: float) -> None:
        if kind not in GATES:
            raise ValueError(f"unknown gates {kind!r}; known: {', '.join(GATES)}")
        self.kind = kind
        self.threshold = threshold
        self.scale = scale

    @torch.no_grad()
    def weights(
        self, stages: Sequence[TrainingStage], stage_weights: Sequence[float]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """S weights and S eligibilities in [0, 1], each ``[R_s]``.

        Args:
            stages: S stages.
            stage_weights: S weights.
        """
        first = stages[0]
        unsettled = first.logits.new_ones(len(first.proposal_index), dtype=torch.float32)  # [R_0]
        weight_sum = torch.zeros_like(unsettled)
        eligibilities, weights = [], []
        for stage_weight, output in zip(stage_weights, stages, strict=True):
            rows = output.proposal_index
            eligible = unsettled[rows]  # [R_s]
            weight = stage_weight * eligible + _MIN_WEIGHT
            weight_sum[rows] += weight
            unsettled[rows] = eligible * (1.0 - self._settled(output))
            eligibilities.append(eligible)
            weights.append(weight)
        pairs = zip(weights, stages, strict=True)
        return [w / weight_sum[output.proposal_index] for w, output in pairs], eligibilities

    def _settled(self, output: TrainingStage) -> Tensor:
        """``[R_s]`` in [0, 1]: how far a stage settles its regions."""
        labels = output.regions.gt_classes
        probs = torch.softmax(output.logits.float(), dim=1)  # [R_s, K + 1]
        if self.kind == "hard":
            confidence, classes = probs.max(dim=1)
            return ((confidence >= self.threshold) & (classes == labels)).float()
        label_probs = probs.gather(1, labels[:, None]).squeeze(1)
        return torch.sigmoid(self.scale * (label_probs - self.threshold))
