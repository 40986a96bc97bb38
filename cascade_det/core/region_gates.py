"""Confidence-gated training: which stages teach a region its class.

Shapes: S stages; R_s regions that stage s saw, ``R_0`` of them at the first, K foreground classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cascade_det.core.training_stage import TrainingStage

GATES = ("hard", "soft")
# The smallest weight before normalisation: no region is lost to any stage.
_LEAST = 1e-3


class RegionGates:
    """Weights of the class loss by region and stage (arXiv 2509.17885), with regions for samples.

    A stage teaches regions as far as no stage before has settled them. Stage k settles a region,
    by the softmax of its own logits p_k and the label y_k that the region has at this stage's IoU,
    background included:

    - "hard": entirely, if max p_k >= threshold and argmax p_k = y_k; else not at all;
    - "soft": by sigmoid(scale (p_k(y_k) - threshold)).

    Eligibility is the product over the stages before of what is left unsettled, 1 at stage 0. The
    weights are stage weight x eligibility + 0.001, normalised to a sum of 1 over the stages
    that the region reached. No gradient flows through them.

    The paper's repository has a scale of 1, with which what is left unsettled lies between 0.48
    and 0.71 whatever p is (at 0.9): nearly constant. About 15 makes it a gate.

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
        self, passes: Sequence[TrainingStage], stage_weights: Sequence[float]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """S tensors ``[R_s]`` each: the weights, and eligibilities in [0, 1]."""
        left = passes[0].logits.new_ones(len(passes[0].rows), dtype=torch.float32)
        total = torch.zeros_like(left)
        eligibilities, weights = [], []
        for stage_weight, run in zip(stage_weights, passes, strict=True):
            eligible = left[run.rows]
            weight = stage_weight * eligible + _LEAST
            total[run.rows] += weight
            left[run.rows] = eligible * (1.0 - self._settled(run))
            eligibilities.append(eligible)
            weights.append(weight)
        normalised = [w / total[run.rows] for w, run in zip(weights, passes, strict=True)]
        return normalised, eligibilities

    def _settled(self, run: TrainingStage) -> Tensor:
        """``[R_s]`` in [0, 1]: how far a stage settles its regions."""
        probs, labels = torch.softmax(run.logits.float(), dim=1), run.regions.gt_classes
        if self.kind == "hard":
            confidence, classes = probs.max(dim=1)
            return ((confidence >= self.threshold) & (classes == labels)).float()
        of_label = probs.gather(1, labels[:, None]).squeeze(1)
        return torch.sigmoid(self.scale * (of_label - self.threshold))
