"""Every-prefix training: any stages together are trained to be a final answer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade_det.core.ensemble import ScoreEnsemble
from cascade_det.core.training_stage import TrainingStage


def prefix_loss(passes: Sequence[TrainingStage], ensemble: ScoreEnsemble) -> Tensor:
    """Mean class loss of the ensembles of all non-empty subsets of the stages.

    MUTATION (MERIT, arXiv 2303.16892) sums one loss for each subset of the outputs,
    of their summed logits. Here the ensemble is the one that gives the scores at test: the
    negative log of the mean softmax, or cross-entropy of the mean logits. Crops and labels of a
    region differ from stage to stage: the label is that of the deepest stage of the subset, and
    regions that did not reach it do not count. The mean over the 2^S - 1 subsets, where MERIT has
    the sum, is of the size of one stage's loss however many stages there are.

    Args:
        passes: S stages.
        ensemble: see ``ScoreEnsemble.log_probs``.

    Returns:
        a scalar; exactly 0, with gradients, without regions.
    """
    losses = []
    for deepest, last in enumerate(passes):
        labels = last.regions.gt_classes
        # Rows rise and only ever get fewer: those of a stage are found in every one before it.
        logits = [
            run.logits[torch.searchsorted(run.rows, last.rows)] for run in passes[: deepest + 1]
        ]
        for count in range(deepest + 1):
            for earlier in combinations(logits[:-1], count):
                log_probs = ensemble.log_probs([*earlier, logits[-1]])
                loss = F.nll_loss(log_probs, labels, reduction="sum") / max(len(labels), 1)
                losses.append(loss)
    return torch.stack(losses).mean()
