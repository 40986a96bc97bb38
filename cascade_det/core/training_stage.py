"""The output of one stage in a training pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cascade_det.core.matching import LabelledRegions


@dataclass
class TrainingStage:
    """One stage of a training pass.

    Attributes:
        regions: R regions, labelled for this stage.
        proposal_index: int64 ``[R]``, ascending: index of each region among those of stage 0.
            Regions whose box became empty are missing from later stages.
        logits: ``[R, K + 1]``.
        deltas: ``[R, 4]`` or ``[R, 4 K]``.
    """

    regions: LabelledRegions
    proposal_index: Tensor
    logits: Tensor
    deltas: Tensor
