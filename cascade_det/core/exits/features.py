"""What learned exits know of a region: a few numbers of the size of 1, whatever the data set.

They are scaled by constants, never by statistics, so that they need no data to be set up, and a
region has the same ones in every batch. What depends on other regions is told from the live ones
of the same image. R live regions, K foreground classes.
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

# A region of this side, in pixels, is of medium size; an e-fold of it is SIZE_SCALE apart.
MEDIUM_SIZE = 64.0
SIZE_SCALE = 2.0
LOGIT_SCALE = 4.0
# Of ln(1 + count): about 7 for the usual thousand regions of an image.
COUNT_SCALE = 4.0
SMALLEST_PROBABILITY = 1e-4


def proposal_features(view: RegionView) -> Tensor:
    """Features that regions have before stage 0, and keep: float32 ``[R, NUM_PROPOSAL_FEATURES]``.

    The objectness, the width and the height, and LEAR's four (arXiv 2105.02568, section 3): rank,
    score (as a logit too), score between the worst and the best of the image, and how many there
    are; the rank also as a share of these.
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
    """Features that regions have after a stage: float32 ``[R, NUM_REGION_FEATURES]``.

    Those of a proposal, with the largest foreground probability for a score; and of the class
    probabilities the largest of the foreground, the background's, the lead of the first class and
    the entropy (EENet, arXiv 2301.07099); how long the stages agree; and how far the box moved.
    """
    assert view.probs is not None
    assert view.agreements is not None
    probs = view.probs.float()
    foreground, background = probs[:, :-1], probs[:, -1]
    most = min(NUM_TOP_CLASSES, foreground.shape[1])
    top = F.pad(foreground.topk(most, dim=1).values, (0, NUM_TOP_CLASSES - most))
    first, second = probs.topk(2, dim=1).values.unbind(dim=1)
    entropy = -torch.special.xlogy(probs, probs).sum(dim=1) / math.log(probs.shape[1])
    others = (
        torch.logit(background, eps=SMALLEST_PROBABILITY) / LOGIT_SCALE,
        first - second,
        entropy,
        view.agreements.float(),
        view.refinement_ious.float(),
    )
    # The best class is the score, which is among the features of a proposal.
    return torch.cat((proposal_features(view), top[:, 1:], torch.stack(others, dim=1)), dim=1)


def _between_worst_and_best(view: RegionView) -> Tensor:
    """``[R]`` in [0, 1]: 1 for the best score of an image, 0 for the worst; 1 if all are equal."""
    scores = view.scores.float()
    best, worst = (
        torch.zeros(view.num_images, device=scores.device).scatter_reduce(
            0, view.image_index, scores, reduce, include_self=False
        )
        for reduce in ("amax", "amin")
    )
    spread = (best - worst)[view.image_index]
    return 1.0 - (best[view.image_index] - scores) / spread.where(spread > 0, 1.0)
