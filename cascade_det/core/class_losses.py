"""Class losses for rare and for hard classes, region by region.

Shapes: S stages, R regions of a stage, K foreground classes, background is class K.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from cascade_det.core.structures.on_device import group_sizes
from cascade_det.core.training_stage import TrainingStage

CLASS_LOSSES = ("cross_entropy", "focal", "seesaw")


class ClassLoss(nn.Module):
    """The class loss of the regions of each stage, with a weight per class.

    Scores stay the softmax of K + 1 logits with each kind, so inference, exits and ensembles need
    not know how a model was trained.

    - "cross_entropy": -log p of the label.
    - "focal": -(1 - p)^gamma log p (arXiv 1708.02002, equation 4), with p of the softmax. The alpha
      of the paper is a class weight.
    - "seesaw" (arXiv 2008.10032): region of class i, with logits z,

          -log(e^z_i / (e^z_i + sum_{j != i} S_ij e^z_j)),  S_ij = M_ij C_ij
          M_ij = min(1, N_j / N_i)^p,  C_ij = max(1, p_j / p_i)^q

      over the foreground classes; S carries no gradient. N_i is the number of regions of class i
      that the stage has trained on so far, this pass included, and at least 1. Background is told
      from foreground by a cross-entropy, the paper's objectness branch; here the branch has no
      weights of its own: its logit is that of all foreground, logsumexp(z_1..z_K) - z_background,
      so the softmax is the product of objectness and class, and p = q = 0 is the cross-entropy.
      The normalised last layer of the paper is not part of the loss, and left out.

    Counts are summed over the processes, so all have the same state and the checkpoint of one
    restores all; they are buffers, so a resumed training is bit-equal to an uninterrupted one. Each
    part of an accumulated batch is one pass.

    Args:
        kind: one of ``CLASS_LOSSES``.
        num_stages: S.
        num_classes: K.
        class_weights: K + 1 factors by label, background last; empty for 1.
        focal_gamma: 0 or more.
        seesaw_p: exponent of the counts, 0 or more.
        seesaw_q: exponent of the probabilities, 0 or more.

    Attributes:
        counts: int64 ``[S, K]`` with "seesaw", else absent.

    Raises:
        ValueError: an unknown kind, or another number of weights.
    """

    def __init__(
        self,
        kind: str = "cross_entropy",
        *,
        num_stages: int,
        num_classes: int,
        class_weights: Sequence[float] = (),
        focal_gamma: float = 2.0,
        seesaw_p: float = 0.8,
        seesaw_q: float = 2.0,
    ) -> None:
        super().__init__()
        if kind not in CLASS_LOSSES:
            raise ValueError(f"unknown class loss {kind!r}; known: {', '.join(CLASS_LOSSES)}")
        if class_weights and len(class_weights) != num_classes + 1:
            raise ValueError(
                f"{len(class_weights)} class_weights for {num_classes} classes and background"
            )
        self.kind = kind
        self.num_classes = num_classes
        self.focal_gamma = focal_gamma
        self.seesaw_p = seesaw_p
        self.seesaw_q = seesaw_q
        self.weights: Tensor | None
        weights = torch.tensor(class_weights) if class_weights else None
        self.register_buffer("weights", weights, persistent=False)
        if kind == "seesaw":
            self.counts: Tensor
            self.register_buffer("counts", torch.zeros(num_stages, num_classes, dtype=torch.int64))

    def forward(self, stages: Sequence[TrainingStage]) -> list[Tensor]:
        """S losses ``[R]`` by region; with "seesaw" the labels are counted first.

        Args:
            stages: all S stages of a pass.
        """
        if self.kind == "seesaw":
            self._count(stages)
        return [
            self._weighted(stage, output.logits.float(), output.regions.gt_classes)
            for stage, output in enumerate(stages)
        ]

    def _weighted(self, stage: int, logits: Tensor, labels: Tensor) -> Tensor:
        if self.kind == "focal":
            losses = focal_loss(logits, labels, self.focal_gamma)
        elif self.kind == "seesaw":
            losses = seesaw_loss(
                logits, labels, self.counts[stage], p=self.seesaw_p, q=self.seesaw_q
            )
        else:
            losses = F.cross_entropy(logits, labels, reduction="none")
        return losses if self.weights is None else self.weights[labels] * losses

    @torch.no_grad()
    def _count(self, stages: Sequence[TrainingStage]) -> None:
        labels = [group_sizes(s.regions.gt_classes, self.num_classes + 1) for s in stages]
        counts = torch.stack(labels)[:, :-1].contiguous()  # [S, K]
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(counts)
        self.counts += counts


def focal_loss(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Focal loss ``[R]`` of the softmax.

    Args:
        logits: float32 ``[R, K + 1]``.
        labels: int64 ``[R]`` in ``[0, K]``.
        gamma: 0 is the cross-entropy.
    """
    losses = F.cross_entropy(logits, labels, reduction="none")
    # At 0 a power below 1 has no finite gradient.
    missing = -torch.expm1(-losses).clamp(max=-torch.finfo(losses.dtype).tiny)  # 1 - p
    return missing**gamma * losses


def seesaw_loss(logits: Tensor, labels: Tensor, counts: Tensor, *, p: float, q: float) -> Tensor:
    """Seesaw loss ``[R]`` with objectness, see :class:`ClassLoss`.

    Args:
        logits: float32 ``[R, K + 1]``.
        labels: int64 ``[R]`` in ``[0, K]``.
        counts: ``[K]``, regions of each class so far.
        p: exponent of the counts.
        q: exponent of the probabilities.
    """
    classes, background = logits[:, :-1], logits[:, -1]  # [R, K], [R]
    is_object = labels < classes.shape[1]
    objectness = torch.logsumexp(classes, dim=1) - background  # [R]
    losses = F.softplus(torch.where(is_object, -objectness, objectness))
    # Background rows take the last class, and are left out below.
    own = labels.clamp(max=classes.shape[1] - 1)[:, None]  # [R, 1]
    own_logits = classes.gather(1, own)
    with torch.no_grad():
        log_counts = counts.clamp(min=1).to(logits.dtype).log()  # [K]
        fewer = (log_counts - log_counts[own]).clamp(max=0)  # [R, K], log of min(1, N_j / N_i)
        likelier = (classes - own_logits).clamp(min=0)  # log of max(1, p_j / p_i)
        log_factors = p * fewer + q * likelier
    among_objects = torch.logsumexp(classes + log_factors, dim=1) - own_logits.squeeze(1)
    return losses + torch.where(is_object, among_objects, torch.zeros_like(among_objects))
