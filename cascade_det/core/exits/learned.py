"""Exits that are learned: predicted IoU, a gate for what is done, a pruner for what is nothing.

Shapes: R live regions of the whole batch, S stages, F the width of a box head's output, C the
channels of a proposal's crop. Gate 0 is before stage 0, gate s + 1 after stage s; behind the last
stage there is none. All are computed in float32 whatever autocast says.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascade_det.core.exits.features import (
    NUM_PROPOSAL_FEATURES,
    NUM_REGION_FEATURES,
    proposal_features,
    region_features,
)
from cascade_det.core.exits.view import BEFORE_STAGES, RegionView

LEARNED_PARTS = ("iou_head", "gate", "pruner")


class LearnedParts(nn.Module):
    """The trained parts of exits; those that were not asked for are not there.

    Untrained, every part answers 0.5.

    Args:
        names: which of ``LEARNED_PARTS``.
        num_stages: S.
        hidden_features: S widths F of the outputs of the box heads.
        crop_channels: C of the crops that the pruner sees before stage 0; 0 for none.

    Attributes:
        names: the parts that are there, in the order of ``LEARNED_PARTS``.
        crop_channels: C, as above; 0 also where there is no pruner.
        iou_head: one linear layer for each stage.
        gate: a small network for each stage but the last.
        pruner: a small network for each gate.

    Raises:
        ValueError: for a name that is not in ``LEARNED_PARTS``, or widths that are not S.
    """

    def __init__(
        self,
        *,
        names: Collection[str],
        num_stages: int,
        hidden_features: Sequence[int],
        crop_channels: int = 0,
    ) -> None:
        super().__init__()
        if unknown := sorted(set(names) - set(LEARNED_PARTS)):
            raise ValueError(f"unknown parts {unknown}; known: {', '.join(LEARNED_PARTS)}")
        if len(hidden_features) != num_stages:
            raise ValueError(f"{len(hidden_features)} hidden features for {num_stages} stages")
        self.names = tuple(name for name in LEARNED_PARTS if name in names)
        self.num_stages = num_stages
        self.crop_channels = crop_channels if "pruner" in names else 0
        inputs = NUM_REGION_FEATURES
        self.iou_head, self.gate, self.pruner = (nn.ModuleList() for _ in LEARNED_PARTS)
        if "iou_head" in names:
            inputs += 1
            self.iou_head.extend(_answers_half(nn.Linear(f, 1)) for f in hidden_features)
        if "gate" in names:
            self.gate.extend(_Scorer(inputs) for _ in range(num_stages - 1))
        if "pruner" in names:
            self.pruner.append(_Scorer(NUM_PROPOSAL_FEATURES, crop_channels))
            self.pruner.extend(_Scorer(inputs) for _ in range(num_stages - 1))

    def predict_ious(self, stage: int, hidden: Tensor) -> Tensor:
        """IoU of the box that a stage refines with its object (Cascade-DETR, arXiv 2307.11035).

        Args:
            stage: from 0.
            hidden: ``[R, F]`` or ``[R, ...]`` with as many numbers, output of its box head.

        Returns:
            float32 ``[R]`` in [0, 1].
        """
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.sigmoid(self.iou_head[stage](hidden.float().flatten(1)).squeeze(1))

    def continue_logits(self, view: RegionView) -> Tensor:
        """float32 ``[R]``: logits of ``continue_probability``."""
        with torch.autocast(view.boxes.device.type, enabled=False):
            if view.stage > BEFORE_STAGES:
                return self.pruner[view.stage + 1](self._region_features(view))
            crops = None
            if self.crop_channels:
                assert view.crops is not None
                crops = view.crops.float()
            return self.pruner[0](proposal_features(view), crops)

    def continue_probability(self, view: RegionView) -> Tensor:
        """Whether regions will be among the true positives of the full cascade.

        The classifier "Continue or Exit" of LEAR (arXiv 2105.02568), with regions for documents,
        images for queries and gates for sentinels. It is trained with balanced classes: the
        answers order regions, and are no frequencies.

        Args:
            view: at any gate.

        Returns:
            float32 ``[R]`` in [0, 1].
        """
        return torch.sigmoid(self.continue_logits(view))

    def readiness_logits(self, view: RegionView) -> Tensor:
        """float32 ``[R]``: logits of ``readiness``, also where background is most probable."""
        with torch.autocast(view.boxes.device.type, enabled=False):
            return self.gate[view.stage](self._region_features(view))

    def readiness(self, view: RegionView) -> Tensor:
        """Whether regions lose nothing if they stop here.

        A gate of the kind of EENet's (arXiv 2301.07099), which sees the box as well as the class.

        Args:
            view: after a stage.

        Returns:
            float32 ``[R]`` in [0, 1]; 0 where background is the most probable class.
        """
        return torch.sigmoid(self.readiness_logits(view)) * view.is_foreground

    def _region_features(self, view: RegionView) -> Tensor:
        features = region_features(view)
        if "iou_head" not in self.names:
            return features
        assert view.predicted_ious is not None
        return torch.cat((features, view.predicted_ious.float()[:, None]), dim=1)


class LearnedPruner:
    """Drops what is not likely to end as a true positive.

    Args:
        parts: with a pruner.
        thresholds: of ``LearnedParts.continue_probability``, in [0, 1], one for each gate: before
            stage 0, after stage 0, ...; 0 is never.
    """

    reason = "background"

    def __init__(self, parts: LearnedParts, thresholds: Sequence[float]) -> None:
        self.parts = parts
        self.thresholds = tuple(thresholds)

    def is_active(self, stage: int) -> bool:
        """Whether anything may leave after ``stage`` (-1: before the first)."""
        return self.thresholds[stage + 1] > 0

    @torch.no_grad()
    def leaves(self, view: RegionView) -> Tensor:
        """Bool ``[R]``."""
        return self.parts.continue_probability(view) < self.thresholds[view.stage + 1]


class _Scorer(nn.Module):
    """A logit from the features of a region and, where there is one, its crop.

    Args:
        num_features: of the features, which are of the size of 1.
        crop_channels: C; crops are of any size and are normalised.
    """

    hidden_width = 32

    def __init__(self, num_features: int, crop_channels: int = 0) -> None:
        super().__init__()
        self.crop_norm = nn.LayerNorm(crop_channels) if crop_channels else None
        self.fc1 = nn.Linear(num_features + crop_channels, self.hidden_width)
        self.fc2 = nn.Linear(self.hidden_width, self.hidden_width)
        self.logit = _answers_half(nn.Linear(self.hidden_width, 1))

    def forward(self, features: Tensor, crops: Tensor | None = None) -> Tensor:
        """``[R]`` logits."""
        if self.crop_norm is not None:
            assert crops is not None
            features = torch.cat((features, self.crop_norm(crops)), dim=1)
        return self.logit(F.relu(self.fc2(F.relu(self.fc1(features))))).squeeze(1)


def _answers_half(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
