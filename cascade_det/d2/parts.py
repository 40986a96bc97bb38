"""Parts of Detectron2 in terms of the cascade's, and a refusal of those that it cannot replace."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from torch import Tensor, nn

from cascade_det.core import RoIPooler, TrainingSchedule
from cascade_det.core.roi_pooling import CANONICAL_BOX_SIZE, CANONICAL_LEVEL
from cascade_det.core.structures.boxes import MAX_LOG_SCALE
from cascade_det.errors import CheckpointError

# Of torchvision's classifiers, and their names in a trunk.
_FIRST_WEIGHTS = {
    "layer1.0.conv1.weight": "res2.0.conv1.weight",
    "features.0.0.weight": "features.0.0.weight",
}
_PREDICTED_BY_THE_CORE = ("losses", "box_reg_loss", "inference", "predict_boxes", "predict_probs")


def refuse_overrides(own: type, base: type, names: Iterable[str]) -> None:
    """Make sure that a class has methods as ``base`` has them.

    Raises:
        ValueError: ``own`` has another one, or none.
    """
    overridden = [name for name in names if getattr(own, name, None) is not getattr(base, name)]
    if overridden:
        raise ValueError(
            f"{own.__name__} overrides {', '.join(overridden)}, which {base.__name__} has, but "
            "EarlyExitCascadeROIHeads never calls: its cascade does that work itself. Override "
            "another method, or take Detectron2's CascadeROIHeads."
        )


def check_predictor(predictor: FastRCNNOutputLayers) -> None:
    """Make sure that losses and boxes of a predictor are those that the cascade computes.

    Raises:
        ValueError: they are others.
    """
    refuse_overrides(type(predictor), FastRCNNOutputLayers, _PREDICTED_BY_THE_CORE)
    for option in ("use_sigmoid_ce", "use_fed_loss"):
        if getattr(predictor, option):
            raise ValueError(
                f"box_predictors: {option} is True, but the class loss of EarlyExitCascadeROIHeads "
                "is softmax cross-entropy. Set it to False, or take Detectron2's CascadeROIHeads."
            )
    transform = predictor.box2box_transform
    if type(transform) is not Box2BoxTransform or transform.scale_clamp != MAX_LOG_SCALE:
        raise ValueError(
            "box_predictors: box2box_transform has to be Detectron2's Box2BoxTransform with its "
            f"usual scale_clamp, not {type(transform).__name__} with {transform.scale_clamp}"
        )


def refuse_torchvision_names(part: nn.Module, incompatible: Any) -> None:
    """A hook after ``load_state_dict``: a trunk takes no weights under torchvision's names.

    Detectron2's checkpointer logs them as unexpected, and a trunk with frozen norms goes on with
    the random weights that it began with. A part of a model sees the names, but not the weights:
    so they cannot be renamed here.

    Args:
        part: of the model that is loaded.
        incompatible: ``missing_keys`` and ``unexpected_keys`` of the whole model.

    Raises:
        CheckpointError: the names are torchvision's, and the trunk has none of its weights.
    """
    for theirs, ours in _FIRST_WEIGHTS.items():
        missing = any(name.endswith(f".{ours}") for name in incompatible.missing_keys)
        if missing and theirs in incompatible.unexpected_keys:
            raise CheckpointError(
                f"the weights have torchvision's names ({theirs}), which Detectron2 does not know: "
                f"the backbone ({ours}) would stay as it was initialised. Leave MODEL.WEIGHTS "
                "empty and load the file by cascade_det.weights.loading.load_weights(model, file), "
                "which renames them, or train with tools/train_net.py, which does the same."
            )


def pooler_like(pooler: ROIPooler, kernel: str) -> RoIPooler:
    """Our pooler that computes the same.

    Raises:
        ValueError: Detectron2's is of another kind.
    """
    levels = list(pooler.level_poolers)
    height, width = pooler.output_size
    canonical = (pooler.canonical_box_size, pooler.canonical_level)
    if (
        # Not of a class of the user's own, that may compute something else.
        type(pooler) is not ROIPooler
        or any(type(level) is not ROIAlign for level in levels)
        or canonical != (CANONICAL_BOX_SIZE, CANONICAL_LEVEL)
        or height != width
    ):
        raise ValueError(
            "box_pooler has to be Detectron2's ROIPooler, which crops squares by ROIAlign or "
            f"ROIAlignV2, with the canonical box size {CANONICAL_BOX_SIZE} on level "
            f"{CANONICAL_LEVEL}, not {pooler}"
        )
    return RoIPooler(
        output_size=height,
        strides=tuple(round(1 / level.spatial_scale) for level in levels),
        sampling_ratio=common(level.sampling_ratio for level in levels),
        aligned=common(level.aligned for level in levels),
        kernel=kernel,
    )


def threshold(matcher: Matcher) -> float:
    """The IoU from which a matcher of a stage takes regions for foreground.

    Raises:
        ValueError: it does not tell foreground from background by one threshold alone.
    """
    if matcher.labels != [0, 1] or matcher.allow_low_quality_matches:
        raise ValueError(
            "proposal_matchers need one threshold each, background below it, without low-quality "
            f"matches: Matcher([0.5], [0, 1]), not thresholds {matcher.thresholds} with labels "
            f"{matcher.labels}"
        )
    return float(matcher.thresholds[1])


class DynamicMatcher(Matcher):
    """The matcher of the proposals, by the threshold of stage 0 as it is now.

    It is also where a regime sees the proposals: sampling is Detectron2's own.

    Raises:
        ValueError: see ``threshold``.
    """

    def __init__(self, matcher: Matcher, regime: TrainingSchedule) -> None:
        super().__init__([threshold(matcher)], matcher.labels)
        self.regime = regime

    def __call__(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Ground truth and label of each of R proposals, from their IoUs ``[G, R]``."""
        dynamic = self.regime.dynamic
        if dynamic is None or not self.regime.training:
            return super().__call__(match_quality_matrix)
        if match_quality_matrix.numel():
            ious = match_quality_matrix.max(dim=0).values
            image_index = torch.zeros_like(ious, dtype=torch.int64)
            self.regime.observe_proposals(ious, image_index, image_index[:1] == 0)
        now = dynamic.ious((self.thresholds[1],))
        return Matcher(list(now), self.labels)(match_quality_matrix)


def common(values: Iterable[Any]) -> Any:
    """The value that all are.

    Raises:
        ValueError: they differ.
    """
    first, *others = values
    if any(other != first for other in others):
        raise ValueError(f"stages and levels have to agree, but one has {first}, another {others}")
    return first
