"""How the class probabilities of the stages that a region saw become its scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ENSEMBLES = ("mean_probs", "last", "mean_logits", "last_boxes")


class ScoreEnsemble:
    """Running scores over the stages.

    ``mean_probs`` averages the softmax of each head on its own crop (Detectron2, MMDetection);
    ``mean_logits`` averages before the softmax; ``last`` takes the last stage alone;
    ``last_boxes`` is Cascade R-CNN's own test-time ensemble (arXiv 1712.00726, section 4.2): all
    heads run again on the crops of the last stage. Until a region leaves, ``last_boxes`` runs as
    ``mean_probs``, which is what exit policies look at.

    Raises:
        ValueError: for a name that is not in ``ENSEMBLES``.
    """

    def __init__(self, name: str) -> None:
        if name not in ENSEMBLES:
            raise ValueError(f"unknown ensemble {name!r}; known: {', '.join(ENSEMBLES)}")
        self.name = name

    @property
    def reruns_heads(self) -> bool:
        """Whether final scores need every head on the crops of the last stage."""
        return self.name == "last_boxes"

    def add(self, total: Tensor | None, logits: Tensor) -> Tensor:
        """The running state after one more stage.

        Args:
            total: ``[R, K + 1]`` state of the stages before, ``None`` at the first.
            logits: ``[R, K + 1]`` of this stage.
        """
        term = logits.float() if self.name == "mean_logits" else torch.softmax(logits.float(), 1)
        return term if total is None or self.name == "last" else total + term

    def probs(self, total: Tensor | None, num_seen: int) -> Tensor:
        """Class probabilities ``[R, K + 1]`` after ``num_seen`` stages, at least one."""
        assert total is not None
        if self.name == "last":
            return total
        mean = total * (1.0 / num_seen)
        return torch.softmax(mean, dim=1) if self.name == "mean_logits" else mean

    def log_probs(self, logits: Sequence[Tensor]) -> Tensor:
        """Logarithms ``[R, K + 1]`` of what these stages together give as probabilities.

        Args:
            logits: ``[R, K + 1]`` each, at least one, of the same regions.

        Raises:
            ValueError: "last" has one stage alone, and "last_boxes" needs other crops.
        """
        stacked = torch.stack([x.float() for x in logits])
        if self.name == "mean_logits":
            return torch.log_softmax(stacked.mean(dim=0), dim=1)
        if self.name != "mean_probs":
            raise ValueError(f"the ensemble {self.name!r} is no mean over stages")
        return torch.logsumexp(torch.log_softmax(stacked, dim=2), dim=0) - math.log(len(logits))
