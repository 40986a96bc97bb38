"""Checks that the cascade can replace parts of Detectron2, and their settings for it."""

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
from cascade_det.core.roi_levels import CANONICAL_BOX_SIZE, CANONICAL_LEVEL
from cascade_det.core.structures.boxes import MAX_LOG_SCALE
from cascade_det.errors import CheckpointError

# A weight of each kind of classifier that trunks start from, and its name in our trunk.
_CLASSIFIERS = {
    "layer1.0.conv1.weight": "res2.0.conv1.weight",  # torchvision's ResNets
    "features.0.0.weight": "features.0.0.weight",  # torchvision's MobileNets
    "patch_embed.0.c.weight": "patch_embed.0.c.weight",  # EfficientViT
    "patch_embed.0.weight": "patch_embed.0.weight",  # HAT-Net
}
_METHODS_REPLACED = ("losses", "box_reg_loss", "inference", "predict_boxes", "predict_probs")


def check_not_overridden(own: type, base: type, names: Iterable[str]) -> None:
    """Check that a class inherits the methods ``names`` of ``base`` unchanged.

    Raises:
        ValueError: ``own`` overrides or lacks one.
    """
    overridden = [name for name in names if getattr(own, name, None) is not getattr(base, name)]
    if overridden:
        raise ValueError(
            f"{own.__name__} overrides {', '.join(overridden)} of {base.__name__}, which "
            "EarlyExitCascadeROIHeads never calls: its cascade does that work. Override another "
            "method, or use Detectron2's CascadeROIHeads."
        )


def check_predictor(predictor: FastRCNNOutputLayers) -> None:
    """Check that a predictor has the losses and box transform that the cascade computes.

    Raises:
        ValueError: it has others.
    """
    check_not_overridden(type(predictor), FastRCNNOutputLayers, _METHODS_REPLACED)
    for option in ("use_sigmoid_ce", "use_fed_loss"):
        if getattr(predictor, option):
            raise ValueError(
                f"box_predictors: {option} is True, but the class loss of EarlyExitCascadeROIHeads "
                "is softmax cross-entropy. Set it to False, or use Detectron2's CascadeROIHeads."
            )
    transform = predictor.box2box_transform
    if type(transform) is not Box2BoxTransform or transform.scale_clamp != MAX_LOG_SCALE:
        raise ValueError(
            "box_predictors: box2box_transform must be Detectron2's Box2BoxTransform with its "
            f"default scale_clamp, not {type(transform).__name__} with {transform.scale_clamp}"
        )


def refuse_classifier_names(part: nn.Module, incompatible: Any) -> None:
    """Post-hook of ``load_state_dict`` that refuses the weights of a classifier as it names them.

    These are torchvision's names, or the trunk's own without ``backbone.bottom_up.``. Detectron2's
    checkpointer only logs them as unexpected, and the trunk would keep its random weights. The
    hook sees the names but not the weights, so it cannot rename them.

    Args:
        part: the module that the hook belongs to.
        incompatible: ``missing_keys`` and ``unexpected_keys`` of the whole model.

    Raises:
        CheckpointError: the file has a classifier's names, and no weights under the trunk's own.
    """
    for theirs, ours in _CLASSIFIERS.items():
        names = (name for name in incompatible.missing_keys if name.endswith(f".{ours}"))
        missing = next(names, None)
        if missing is not None and theirs in incompatible.unexpected_keys:
            raise CheckpointError(
                f"the weights have the names of a classifier ({theirs}), which Detectron2 does not "
                f"match: the backbone ({missing}) would keep its initial weights. Leave "
                "MODEL.WEIGHTS empty and load the file with cascade_det.weights.load_weights("
                "model, file), which finds their places, or train with cascade-det train, which "
                "does the same."
            )


def to_roi_pooler(pooler: ROIPooler, kernel: str, name: str = "box_pooler") -> RoIPooler:
    """A ``RoIPooler`` that computes the same as a pooler of Detectron2.

    Args:
        pooler: crops squares by ``ROIAlign`` or ``ROIAlignV2``.
        kernel: see ``MODEL.CASCADE.POOLER_KERNEL``.
        name: of the argument, for the message.

    Raises:
        ValueError: the pooler is of another kind.
    """
    levels = list(pooler.level_poolers)
    height, width = pooler.output_size
    canonical = (pooler.canonical_box_size, pooler.canonical_level)
    if (
        # A subclass may compute something else.
        type(pooler) is not ROIPooler
        or any(type(level) is not ROIAlign for level in levels)
        or canonical != (CANONICAL_BOX_SIZE, CANONICAL_LEVEL)
        or height != width
    ):
        raise ValueError(
            f"{name} must be Detectron2's ROIPooler, which crops squares by ROIAlign or "
            f"ROIAlignV2, with the canonical box size {CANONICAL_BOX_SIZE} on level "
            f"{CANONICAL_LEVEL}, not {pooler}"
        )
    return RoIPooler(
        output_size=height,
        strides=tuple(round(1 / level.spatial_scale) for level in levels),
        sampling_ratio=common_value(level.sampling_ratio for level in levels),
        aligned=common_value(level.aligned for level in levels),
        kernel=kernel,
    )


def foreground_threshold(matcher: Matcher) -> float:
    """The IoU at which a stage's matcher labels a region foreground.

    Raises:
        ValueError: the matcher has more than one threshold or low-quality matches.
    """
    if matcher.labels != [0, 1] or matcher.allow_low_quality_matches:
        raise ValueError(
            "proposal_matchers need one threshold each, background below it, without low-quality "
            f"matches: Matcher([0.5], [0, 1]), not thresholds {matcher.thresholds} with labels "
            f"{matcher.labels}"
        )
    return float(matcher.thresholds[1])


class DynamicMatcher(Matcher):
    """Matches proposals at the current IoU threshold of stage 0 of a dynamic training schedule.

    Also reports the IoUs of the proposals to the schedule, since Detectron2 does the sampling.

    Raises:
        ValueError: see ``foreground_threshold``.
    """

    def __init__(self, matcher: Matcher, regime: TrainingSchedule) -> None:
        super().__init__([foreground_threshold(matcher)], matcher.labels)
        self.regime = regime

    def __call__(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Index of the matched object and label, int ``[R]`` each, from IoUs ``[G, R]``."""
        dynamic = self.regime.dynamic
        if dynamic is None or not self.regime.training:
            return super().__call__(match_quality_matrix)
        if match_quality_matrix.numel():
            ious = match_quality_matrix.max(dim=0).values
            image_index = torch.zeros_like(ious, dtype=torch.int64)
            self.regime.observe_proposals(ious, image_index, image_index[:1] == 0)
        now = dynamic.ious((self.thresholds[1],))
        return Matcher(list(now), self.labels)(match_quality_matrix)


def common_value(values: Iterable[Any]) -> Any:
    """The value that all of them share.

    Raises:
        ValueError: they differ.
    """
    first, *others = values
    if any(other != first for other in others):
        raise ValueError(f"stages and levels must agree, but one has {first}, the others {others}")
    return first
