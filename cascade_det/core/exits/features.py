"""Input features of the learned exits, each of about unit size on any data set.

They are scaled by constants, not by statistics: they need no calibration data, and a region has
the same features in every batch. Features relative to other regions use the live regions of the
same image. R live regions, K foreground classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade_det.core.exits.view import RegionView

NUM_TOP_CLASSES = 5
NUM_PROPOSAL_FEATURES = 9
NUM_REGION_FEATURES = NUM_PROPOSAL_FEATURES + NUM_TOP_CLASSES - 1 + 5

# A side of MEDIUM_SIZE pixels gives 0, one of MEDIUM_SIZE * exp(SIZE_SCALE) gives 1.
MEDIUM_SIZE = 64.0
SIZE_SCALE = 2.0
LOGIT_SCALE = 4.0
# Of ln(1 + count), which is about 7 for the usual thousand regions of an image.
COUNT_SCALE = 4.0
SMALLEST_PROBABILITY = 1e-4


def proposal_features(view: RegionView) -> Tensor:
    """Features of proposals and regions at every gate: float32 ``[R, NUM_PROPOSAL_FEATURES]``.

    Objectness, width and height, and the four of LEAR (arXiv 2105.02568, section 3): rank (also
    as a share of the regions), score (also as a logit), score normalised to the worst and best of
    the image, and number of regions.
    """
    scores = view.scores.float()
    count = view.counts[view.image_index].float()
    width, height = (view.boxes[:, 2:] - view.boxes[:, :2]).clamp(min=1.0).unbind(dim=1)
    return torch.stack(
        (
            (view.objectness.float() / LOGIT_SCALE).clamp(-4.0, 4.0),
            torch.log(width / MEDIUM_SIZE) / SIZE_SCALE,
            torch.log(height / MEDIUM_SIZE) / SIZE_SCALE,
            torch.log1p(view.ranks.float()) / COUNT_SCALE,
            view.ranks / count,
            torch.log1p(count) / COUNT_SCALE,
            scores,
            torch.logit(scores, eps=SMALLEST_PROBABILITY) / LOGIT_SCALE,
            _between_worst_and_best(view),
        ),
        dim=1,
    )


def region_features(view: RegionView) -> Tensor:
    """Features of regions after a stage: float32 ``[R, NUM_REGION_FEATURES]``.

    ``proposal_features``, with the largest foreground probability as score; the largest foreground
    probabilities; the probability of background; margin and normalised entropy (EENet, arXiv
    2301.07099); number of agreeing stages; and IoU of the box before and after the stage.
    """
    assert view.probs is not None
    assert view.agreements is not None
    probs = view.probs.float()
    foreground, background = probs[:, :-1], probs[:, -1]  # [R, K], [R]
    most = min(NUM_TOP_CLASSES, foreground.shape[1])
    top = F.pad(foreground.topk(most, dim=1).values, (0, NUM_TOP_CLASSES - most))
    others = (
        torch.logit(background, eps=SMALLEST_PROBABILITY) / LOGIT_SCALE,
        view.margin,
        view.entropy / math.log(probs.shape[1]),
        view.agreements.float(),
        view.refinement_ious.float(),
    )
    # The largest probability is the score, which proposal_features has already.
    return torch.cat((proposal_features(view), top[:, 1:], torch.stack(others, dim=1)), dim=1)


def _between_worst_and_best(view: RegionView) -> Tensor:
    """``[R]`` in [0, 1]: 1 for the best score of an image, 0 for the worst; 1 if all are equal."""
    scores = view.scores.float()
    of_live = scores, scores
    if view.gone is not None:  # neither the best nor the worst, as scores are in [0, 1]
        of_live = scores.masked_fill(view.gone, -1.0), scores.masked_fill(view.gone, 2.0)
    best, worst = (  # [N] each
        torch.zeros(view.num_images, device=scores.device).scatter_reduce(
            0, view.image_index, values, reduce, include_self=False
        )
        for values, reduce in zip(of_live, ("amax", "amin"), strict=True)
    )
    spread = (best - worst)[view.image_index]  # [R]
    return 1.0 - (best[view.image_index] - scores) / spread.where(spread > 0, 1.0)
