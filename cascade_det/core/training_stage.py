"""What one stage made of its regions in training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cascade_det.core.matching import LabelledRegions


@dataclass
class TrainingStage:
    """One stage of a training pass.

    Attributes:
        regions: R of them, labelled for this stage.
        rows: int64 ``[R]``, rising: which of the regions of stage 0 they are. Boxes that became
            empty are not among those of later stages.
        logits: ``[R, K + 1]``.
        deltas: ``[R, 4]`` or ``[R, 4 K]``.
    """

    regions: LabelledRegions
    rows: Tensor
    logits: Tensor
    deltas: Tensor
