"""Regions in the cascade, flat over the batch.

R regions, K foreground classes. Boxes are float32 XYXY in absolute pixels of the resized image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cascade_det.core.exits.view import RegionView
from cascade_det.core.structures.boxes import flatten_images
from cascade_det.core.structures.on_device import take_rows


@dataclass
class Regions:
    """The live regions of a batch; the optional fields are ``None`` before stage 0.

    Attributes:
        boxes: float32 ``[R, 4]``.
        image_index: int64 ``[R]``, ascending.
        objectness: float32 ``[R]``, logits of the proposals.
        proposal_index: int64 ``[R]``, index of each region among the proposals of the batch.
        boxes_before: float32 ``[R, 4]``, the boxes that the last stage pooled.
        score_state: float32 ``[R, K + 1]``, running state of the score ensemble.
        top_class: int64 ``[R]`` in ``[0, K]``, the most probable class; ``None`` unless a rule
            needs agreements.
        agreements: int64 ``[R]``, number of consecutive stages before the last one with the same
            top class; ``None`` unless a rule needs it.
        predicted_ious: float32 ``[R]`` in [0, 1]; ``None`` without an IoU head.
        sizes: N numbers of regions of each image, where the CPU knows them.
    """

    boxes: Tensor
    image_index: Tensor
    objectness: Tensor
    proposal_index: Tensor
    boxes_before: Tensor | None = None
    score_state: Tensor | None = None
    top_class: Tensor | None = None
    agreements: Tensor | None = None
    predicted_ious: Tensor | None = None
    sizes: Sequence[int] | None = None

    @classmethod
    def from_proposals(
        cls,
        proposals: Sequence[Tensor],
        objectness: Sequence[Tensor] | None,
    ) -> Regions:
        """The proposals of N images, before stage 0.

        Args:
            proposals: per image float32 ``[R_i, 4]``, clipped to the image.
            objectness: per image float32 ``[R_i]``, logits; ``None`` counts as 0.
        """
        boxes, image_index = flatten_images(proposals)  # [R, 4], [R]
        logits = boxes.new_zeros(boxes.shape[0]) if objectness is None else torch.cat([*objectness])
        proposal_index = torch.arange(boxes.shape[0], device=boxes.device)
        return cls(boxes, image_index, logits, proposal_index, sizes=[len(p) for p in proposals])

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Tensor | slice) -> Regions:
        chosen: dict[str, Any] = {
            name: take_rows(x, index) if isinstance(x, Tensor) else x
            for name, x in vars(self).items()
        }
        return Regions(**chosen | {"sizes": None})

    def entering(self, index: Tensor | None, sizes: Sequence[int] | None) -> Regions:
        """The regions that enter the next stage, without what that stage replaces.

        Args:
            index: int64, of the regions; ``None`` for all.
            sizes: of the chosen regions, as the attribute.
        """
        lean = replace(self, boxes_before=None, predicted_ious=None)
        return replace(lean if index is None else lean[index], sizes=sizes)

    def view(
        self,
        stage: int,
        num_images: int,
        *,
        probs: Tensor | None = None,
        crops: Tensor | None = None,
        accepted: Sequence[RegionView] = (),
    ) -> RegionView:
        """The input of exit rules after ``stage``; for the arguments see ``RegionView``."""
        return RegionView(
            stage=stage,
            num_images=num_images,
            image_index=self.image_index,
            boxes=self.boxes,
            objectness=self.objectness,
            proposal_index=self.proposal_index,
            boxes_before=self.boxes_before,
            probs=probs,
            agreements=self.agreements,
            predicted_ious=self.predicted_ious,
            crops=crops,
            accepted=accepted,
            sizes=self.sizes,
        )


@dataclass
class StageResult:
    """The output of one stage for the regions that entered it.

    Attributes:
        regions: the refined regions, in the same order.
        decoded: float32 ``[R, 4]`` or ``[R, 4 K]``, all predicted boxes.
        pooled: ``[R, C, P, P]``, kept by ``LastBoxesNetwork`` alone.
        hidden: ``[R, F]``, output of the box head; ``None`` in a replay.
    """

    regions: Regions
    decoded: Tensor
    pooled: Tensor | None = None
    hidden: Tensor | None = None

    def exiting(self, index: Tensor) -> StageResult:
        """Some of the regions, with what is read of those that are reported."""
        lean = Regions(
            boxes=self.regions.boxes,
            image_index=self.regions.image_index,
            objectness=self.regions.objectness,
            proposal_index=self.regions.proposal_index,
            score_state=self.regions.score_state,
        )
        pooled = None if self.pooled is None else take_rows(self.pooled, index)
        return StageResult(lean[index], take_rows(self.decoded, index), pooled)

    def reported(self, probs: Tensor, stage: int) -> ReportedRegions:
        """The regions as reported after ``stage`` with ``probs`` ``[R, K + 1]``."""
        image_index = self.regions.image_index
        return ReportedRegions(
            boxes=self.decoded,
            probs=probs,
            image_index=image_index,
            exit_stages=torch.full_like(image_index, stage),
            proposal_index=self.regions.proposal_index,
        )


@dataclass
class ReportedRegions:
    """Boxes and scores from which detections are selected.

    Attributes:
        boxes: float32 ``[R, 4]`` or ``[R, 4 K]``.
        probs: float32 ``[R, K + 1]``.
        image_index: int64 ``[R]``.
        exit_stages: int64 ``[R]``, the last stage that ran on each region.
        proposal_index: int64 ``[R]``, see ``Regions``.
    """

    boxes: Tensor
    probs: Tensor
    image_index: Tensor
    exit_stages: Tensor
    proposal_index: Tensor
