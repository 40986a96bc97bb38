"""Every-prefix training: every subset of the stages is trained to give the final scores."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade_det.core.ensemble import ScoreEnsemble
from cascade_det.core.training_stage import TrainingStage


def prefix_loss(stages: Sequence[TrainingStage], ensemble: ScoreEnsemble) -> Tensor:
    """Mean class loss over the ensembles of all non-empty subsets of the stages.

    MUTATION (MERIT, arXiv 2303.16892) sums one loss per subset of the outputs, on their summed
    logits. Three things differ here. The ensemble is that of inference: the negative log of the
    mean softmax, or cross-entropy of the mean logits. The label of a region is that of the
    deepest stage of the subset, and regions that did not reach it are left out, because crops and
    labels change from stage to stage. The mean over the 2^S - 1 subsets replaces the sum, so the
    loss has the size of one stage's for any S.

    Args:
        stages: S stages.
        ensemble: see ``ScoreEnsemble.log_probs``.

    Returns:
        A scalar; exactly 0, with gradients, without regions.
    """
    losses = []
    for deepest, last in enumerate(stages):
        labels = last.regions.gt_classes  # [R], R regions of the deepest stage
        # Indices ascend, and each stage has a subset of the ones before.
        logits = [
            output.logits[torch.searchsorted(output.proposal_index, last.proposal_index)]
            for output in stages[: deepest + 1]
        ]
        for count in range(deepest + 1):
            for earlier in combinations(logits[:-1], count):
                log_probs = ensemble.log_probs([*earlier, logits[-1]])  # [R, K + 1]
                loss = F.nll_loss(log_probs, labels, reduction="sum") / max(len(labels), 1)
                losses.append(loss)
    return torch.stack(losses).mean()
