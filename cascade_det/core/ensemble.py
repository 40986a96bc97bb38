"""Combines the class scores of the stages."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ENSEMBLES = ("mean_probs", "last", "mean_logits", "last_boxes")


class ScoreEnsemble:
    """Running class scores over the stages.

    - ``mean_probs``: mean of the softmax of every stage, each on its own crop (Detectron2,
      MMDetection).
    - ``mean_logits``: softmax of the mean logits.
    - ``last``: the last stage alone.
    - ``last_boxes``: all heads run again on the crops of the last stage (Cascade R-CNN, arXiv
      1712.00726, section 4.2); see ``LastBoxesNetwork``. Until a region exits it has the scores
      of ``mean_probs``, which exit rules see.

    Raises:
        ValueError: for a name that is not in ``ENSEMBLES``.
    """

    def __init__(self, name: str) -> None:
        if name not in ENSEMBLES:
            raise ValueError(f"unknown ensemble {name!r}; known: {', '.join(ENSEMBLES)}")
        self.name = name

    def update(self, state: Tensor | None, logits: Tensor) -> Tensor:
        """The running state ``[R, K + 1]`` after one more stage.

        Args:
            state: ``[R, K + 1]`` after the stages before, ``None`` at the first.
            logits: ``[R, K + 1]`` of this stage.
        """
        term = logits.float() if self.name == "mean_logits" else torch.softmax(logits.float(), 1)
        return term if state is None or self.name == "last" else state + term

    def probs(self, state: Tensor | None, num_stages: int) -> Tensor:
        """Class probabilities ``[R, K + 1]`` from the state after ``num_stages >= 1`` stages."""
        assert state is not None
        if self.name == "last":
            return state
        mean = state if num_stages == 1 else state * (1.0 / num_stages)
        return torch.softmax(mean, dim=1) if self.name == "mean_logits" else mean

    def log_probs(self, logits: Sequence[Tensor]) -> Tensor:
        """Log-probabilities ``[R, K + 1]`` of the mean over the given stages.

        Args:
            logits: at least one ``[R, K + 1]``, all of the same regions.

        Raises:
            ValueError: for "last" and "last_boxes", which are not means over stages.
        """
        stacked = torch.stack([x.float() for x in logits])  # [S, R, K + 1]
        if self.name == "mean_logits":
            return torch.log_softmax(stacked.mean(dim=0), dim=1)
        if self.name != "mean_probs":
            raise ValueError(f"the ensemble {self.name!r} is not a mean over stages")
        return torch.logsumexp(torch.log_softmax(stacked, dim=2), dim=0) - math.log(len(logits))
