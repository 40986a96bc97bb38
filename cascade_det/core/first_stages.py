"""A shorter cascade from the first stages of another."""

from __future__ import annotations

from torch import nn

from cascade_det.core.cascade import CascadeHead
from cascade_det.core.mask_branch import MaskBranch


def first_stages(cascade: CascadeHead, count: int) -> CascadeHead:
    """A cascade for inference that ends after ``count`` stages and shares the modules of another.

    It detects as a cascade that was built with so many stages and given the same weights.

    Args:
        cascade: of S stages; stays as it is, and may be optimised.
        count: stages to keep, 1 to S.

    Returns:
        A cascade without exits, in evaluation mode; ``cascade`` itself for S stages.

    Raises:
        ValueError: ``count`` is not from 1 to S.
    """
    if not 1 <= count <= cascade.num_stages:
        raise ValueError(f"{count} stages of {cascade.num_stages}")
    if count == cascade.num_stages:
        return cascade
    targets, selection = cascade.targets, cascade.selection
    shorter = CascadeHead(
        pooler=cascade.pooler,
        box_heads=list(cascade.box_head)[:count],
        box_predictors=list(cascade.box_predictor)[:count],
        num_classes=cascade.num_classes,
        ious=targets.ious[:count],
        bbox_reg_weights=targets.bbox_reg_weights[:count],
        ensemble=cascade.ensemble.name,
        score_thresh=selection.score_thresh,
        nms_thresh=selection.nms_thresh,
        detections_per_image=selection.detections_per_image,
        suppression=selection.suppression,
        suppression_sigma=selection.sigma,
        masks=_first_heads(cascade.masks, count),
    )
    return shorter.eval()


def _first_heads(masks: MaskBranch | None, count: int) -> MaskBranch | None:
    if masks is None or not masks.per_stage:
        return masks
    return masks.with_heads(nn.ModuleList(masks.heads[:count]))
