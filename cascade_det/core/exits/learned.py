"""Learned exits: IoU head, gate that accepts regions, pruner of background, head of tiles.

Shapes: R live regions of the whole batch, S stages, F outputs of a box head, C channels of a
proposal's crop. Gate 0 is before stage 0, gate s + 1 after stage s; there is none after the last
stage. Everything is computed in float32, also under autocast.
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
from cascade_det.core.exits.tile_head import TileHead
from cascade_det.core.exits.view import BEFORE_STAGES, RegionView

# Parts that look at regions, and the one that looks at tiles.
REGION_PARTS = ("iou_head", "gate", "pruner")
LEARNED_PARTS = (*REGION_PARTS, "tile_head")


class LearnedParts(nn.Module):
    """The trained parts of exits. Untrained, every part returns 0.5.

    Args:
        names: the parts to build, from ``LEARNED_PARTS``.
        num_stages: S.
        hidden_features: S widths F of the outputs of the box heads.
        crop_channels: C of the crops that the pruner reads before stage 0; 0 for none.
        tile_channels: of the RPN's hidden map, for a tile head.

    Attributes:
        names: the parts, in the order of ``LEARNED_PARTS``.
        crop_channels: C as above; 0 without a pruner.
        iou_head: S linear layers; empty if not built, as the next two.
        gate: S - 1 small networks, one per stage but the last.
        pruner: S small networks, one per gate.
        tile_head: opens tiles of the finest map; ``None`` if not built.

    Raises:
        ValueError: for an unknown name, if there are not S widths, or for a tile head without
            channels.
    """

    def __init__(
        self,
        *,
        names: Collection[str],
        num_stages: int,
        hidden_features: Sequence[int],
        crop_channels: int = 0,
        tile_channels: int = 0,
    ) -> None:
        super().__init__()
        if unknown := sorted(set(names) - set(LEARNED_PARTS)):
            raise ValueError(f"unknown parts {unknown}; known: {', '.join(LEARNED_PARTS)}")
        if len(hidden_features) != num_stages:
            raise ValueError(f"{len(hidden_features)} hidden features for {num_stages} stages")
        if "tile_head" in names and not tile_channels:
            raise ValueError("a tile head needs the channels of the RPN's hidden map")
        self.names = tuple(name for name in LEARNED_PARTS if name in names)
        self.num_stages = num_stages
        self.crop_channels = crop_channels if "pruner" in names else 0
        inputs = NUM_REGION_FEATURES
        self.iou_head, self.gate, self.pruner = (nn.ModuleList() for _ in REGION_PARTS)
        if "iou_head" in names:
            inputs += 1
            self.iou_head.extend(_zero_initialised(nn.Linear(f, 1)) for f in hidden_features)
        if "gate" in names:
            self.gate.extend(_Scorer(inputs) for _ in range(num_stages - 1))
        if "pruner" in names:
            self.pruner.append(_Scorer(NUM_PROPOSAL_FEATURES, crop_channels))
            self.pruner.extend(_Scorer(inputs) for _ in range(num_stages - 1))
        self.tile_head = TileHead(tile_channels) if "tile_head" in names else None

    def predict_ious(self, stage: int, hidden: Tensor) -> Tensor:
        """IoU of the box that a stage refines with its object (Cascade-DETR, arXiv 2307.11035).

        Args:
            stage: from 0.
            hidden: ``[R, F]``, output of its box head; further axes are flattened.

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
        """Score for regions to end as true positives of the full cascade.

        The classifier "Continue or Exit" of LEAR (arXiv 2105.02568), with regions for documents,
        images for queries and gates for sentinels. It is trained with balanced classes: the scores
        rank regions, but are not calibrated probabilities.

        Args:
            view: at any gate.

        Returns:
            float32 ``[R]`` in [0, 1].
        """
        return torch.sigmoid(self.continue_logits(view))

    def readiness_logits(self, view: RegionView) -> Tensor:
        """float32 ``[R]``: logits of ``readiness``, without the mask of background."""
        with torch.autocast(view.boxes.device.type, enabled=False):
            return self.gate[view.stage](self._region_features(view))

    def readiness(self, view: RegionView) -> Tensor:
        """Probability that regions lose nothing by an exit here.

        A gate like that of EENet (arXiv 2301.07099), with features of the box and of the class.

        Args:
            view: after a stage.

        Returns:
            float32 ``[R]`` in [0, 1]; 0 where background is most probable.
        """
        return torch.sigmoid(self.readiness_logits(view)) * view.is_foreground

    def _region_features(self, view: RegionView) -> Tensor:
        features = region_features(view)  # [R, NUM_REGION_FEATURES]
        if "iou_head" not in self.names:
            return features
        assert view.predicted_ious is not None
        return torch.cat((features, view.predicted_ious.float()[:, None]), dim=1)


class _Scorer(nn.Module):
    """An MLP from the features of a region, and its crop if C > 0, to one logit.

    Args:
        num_features: number of features, each of about unit size.
        crop_channels: C; crops are normalised first.
    """

    hidden_width = 32

    def __init__(self, num_features: int, crop_channels: int = 0) -> None:
        super().__init__()
        self.crop_norm = nn.LayerNorm(crop_channels) if crop_channels else None
        self.fc1 = nn.Linear(num_features + crop_channels, self.hidden_width)
        self.fc2 = nn.Linear(self.hidden_width, self.hidden_width)
        self.logit = _zero_initialised(nn.Linear(self.hidden_width, 1))

    def forward(self, features: Tensor, crops: Tensor | None = None) -> Tensor:
        """``[R, num_features]`` and ``[R, C]`` to logits ``[R]``."""
        if self.crop_norm is not None:
            assert crops is not None
            features = torch.cat((features, self.crop_norm(crops)), dim=1)  # [R, num_features + C]
        return self.logit(F.relu(self.fc2(F.relu(self.fc1(features))))).squeeze(1)


def _zero_initialised(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
