"""Losses of a segmenter that predicts one map per level: cross entropy and Dice of subsets.

N images, K classes, L levels. Logits are ``[N, K, H, W]``, labels int64 ``[N, H, W]`` in
``0..K-1`` or the ignore value. Ignored pixels take no part in any sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

IGNORE_VALUE = 255
SUBSETS = ("mutation", "singletons")

# Smoothing of Dice as published: the Dice of a class without truth and prediction is 1.
_EPSILON = 1e-5


def dice_loss(logits: Tensor, labels: Tensor, *, ignore_value: int = IGNORE_VALUE) -> Tensor:
    """Softmax Dice loss, with sums over the whole batch; the mean over all classes.

    With probabilities ``p`` and one-hot labels ``y`` of a class, its loss is
    ``1 - (2 sum(p y) + 1e-5) / (sum(p^2) + sum(y^2) + 1e-5)``. A class that is not in the batch
    counts as well, and is close to 1 unless hardly any pixel is predicted as it.

    Args:
        logits: ``[N, K, H, W]``.
        labels: int64 ``[N, H, W]``.
        ignore_value: label of the pixels to leave out.

    Returns:
        Scalar, at least float32; 0 with zero gradients if all pixels are ignored.

    Raises:
        ValueError: the sizes of logits and labels differ.
    """
    loss = SubsetLoss("singletons", ce_weight=0.0, dice_weight=1.0, ignore_value=ignore_value)
    return loss([logits], labels)


class SubsetLoss(nn.Module):
    """Cross entropy and Dice of the summed logits of every subset of the levels.

    MUTATION ("Multi-scale Hierarchical Vision Transformer with Cascaded Attention Decoding",
    arXiv 2303.16892, section 3.3) takes all ``2^L - 1`` non-empty subsets, so that any levels
    together are a prediction. Singletons are deep supervision, as in CASCADE (WACV 2023). Cross
    entropy is the mean over the pixels of the batch that are not ignored; for Dice, see
    ``dice_loss``. In training over several processes, the sums are those of each one.

    The gradients of all levels are computed together with the loss, one subset after another, so
    that memory does not grow with the number of subsets. They cannot be differentiated again.

    Args:
        subsets: ``mutation`` or ``singletons``.
        ce_weight: weight of the cross entropy of each subset.
        dice_weight: weight of the Dice loss of each subset.
        ignore_value: label of the pixels to leave out.
        mean: multiply MUTATION by ``L / (2^L - 1)``: it is then L times the mean over the subsets,
            as deep supervision is L times the mean over the levels, and needs no other learning
            rate. The published loss is the plain sum. Singletons are the same either way.

    Raises:
        ValueError: ``subsets`` is unknown.
    """

    def __init__(
        self,
        subsets: str = "mutation",
        *,
        ce_weight: float = 0.3,
        dice_weight: float = 0.7,
        ignore_value: int = IGNORE_VALUE,
        mean: bool = False,
    ) -> None:
        super().__init__()
        if subsets not in SUBSETS:
            raise ValueError(f"unknown subsets {subsets!r}; known: {', '.join(SUBSETS)}")
        self.subsets = subsets
        self.ce_weight = ce_weight
        self.dice_weight = dice_weight
        self.ignore_value = ignore_value
        self.mean = mean

    def forward(self, logits: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The loss of the maps of all levels, each at the size of the labels.

        Args:
            logits: L times ``[N, K, H, W]``, one or more; half precision is computed in float32.
            labels: int64 ``[N, H, W]``.

        Returns:
            Scalar, at least float32; 0 with zero gradients if all pixels are ignored.

        Raises:
            ValueError: no logits, or they and the labels have different sizes.
        """
        if not logits:
            raise ValueError("a loss needs the logits of one level or more")
        n, k = logits[0].shape[:2]
        for level in logits:
            if (level.shape[:2], labels.shape) != ((n, k), (n, *level.shape[2:])):
                raise ValueError(
                    f"logits {tuple(level.shape)} do not fit labels {tuple(labels.shape)} and "
                    f"{k} classes; resize them to (N, K, H, W) for labels (N, H, W)"
                )
        dtype = torch.promote_types(logits[0].dtype, torch.float32)
        levels = [level.to(dtype) for level in logits]
        all_subsets = self.subsets == "mutation"
        terms = _Terms(
            labels,
            k,
            dtype,
            ignore_value=self.ignore_value,
            ce_weight=self.ce_weight,
            dice_weight=self.dice_weight,
        )
        loss: Tensor = _SubsetSum.apply(terms, all_subsets, *levels)
        if self.mean and all_subsets:
            loss = loss * (len(levels) / (2 ** len(levels) - 1))
        return loss

    def extra_repr(self) -> str:
        """The arguments, in a printed model."""
        return (
            f"{self.subsets!r}, ce_weight={self.ce_weight}, dice_weight={self.dice_weight}, "
            f"ignore_value={self.ignore_value}, mean={self.mean}"
        )


class _Terms:
    """Loss and gradient of one prediction; what depends on the labels alone is computed once."""

    def __init__(
        self,
        labels: Tensor,
        num_classes: int,
        dtype: torch.dtype,
        *,
        ignore_value: int,
        ce_weight: float,
        dice_weight: float,
    ) -> None:
        valid = labels.ne(ignore_value).unsqueeze(1)  # [N, 1, H, W]
        # None: nothing has to be masked. The CPU waits for the GPU here.
        self.valid = None if bool(valid.all()) else valid
        self.target = labels.unsqueeze(1).where(valid, 0)  # [N, 1, H, W]
        n, *size = labels.shape
        # Zero for all classes where a pixel is ignored.
        self.one_hot = torch.zeros((n, num_classes, *size), dtype=dtype, device=labels.device)
        self.one_hot.scatter_(1, self.target, valid.to(dtype))
        self.pixels = _class_sums(self.one_hot)
        self.ce_scale = ce_weight / self.pixels.sum().clamp(min=1)
        self.dice_weight = dice_weight

    def __call__(self, logits: Tensor, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Loss (float64 scalar) and its gradient, for logits ``[N, K, H, W]``."""
        largest = logits.amax(1, keepdim=True)  # [N, 1, H, W]
        p = (logits - largest).exp_()
        total = p.sum(1, keepdim=True)
        p.div_(total)
        nll = largest - logits.gather(1, self.target) + total.log_()
        if self.valid is not None:
            p.mul_(self.valid)
            nll = nll.where(self.valid, 0)
        squares = p.square()

        overlap = 2 * _class_sums(p * self.one_hot) + _EPSILON
        whole = _class_sums(squares) + self.pixels + _EPSILON
        loss = self.ce_scale * nll.sum((1, 2, 3)).sum(dtype=torch.float64)
        loss = loss + self.dice_weight * (1 - overlap / whole).mean()
        if not with_gradient:
            return loss, None

        # d Dice / d p of a class is of_p * p, and at the pixels of the class also of_true.
        scale = self.dice_weight / len(self.pixels)
        of_p = (2 * scale * overlap / whole.square()).to(p.dtype).view(1, -1, 1, 1)
        of_true = (-2 * scale / whole).to(p.dtype)[self.target]  # [N, 1, H, W]
        ce_scale = self.ce_scale.to(p.dtype)
        # Through the softmax, g becomes p * (g - sum of p * g over the classes).
        of_true = of_true.mul_(p.gather(1, self.target))
        weighted = squares.mul_(of_p)
        inner = weighted.sum(1, keepdim=True) + of_true
        gradient = weighted.addcmul_(p, ce_scale - inner)
        return loss, gradient.addcmul_(self.one_hot, of_true - ce_scale)


def _class_sums(values: Tensor) -> Tensor:
    """Sums ``[K]`` in float64 over images and pixels of ``[N, K, H, W]``."""
    return values.sum((2, 3)).sum(0, dtype=torch.float64)


class _SubsetSum(torch.autograd.Function):
    """Sum of the terms of all subsets, or of the levels alone."""

    @staticmethod
    def forward(ctx: Any, terms: _Terms, all_subsets: bool, *levels: Tensor) -> Tensor:
        with_gradient = any(ctx.needs_input_grad)
        gradients: list[Tensor | None] = [None] * len(levels)
        total = torch.zeros((), dtype=torch.float64, device=levels[0].device)

        def extend(partial: Tensor | None, first: int) -> Tensor | None:
            """Add all subsets of a sum of levels before ``first`` and one or more from there on.

            Returns the gradient with respect to ``partial``.
            """
            nonlocal total
            sum_of_all = None
            for index in range(first, len(levels)):
                logits = levels[index] if partial is None else partial + levels[index]
                loss, gradient = terms(logits, with_gradient=with_gradient)
                total = total + loss
                if all_subsets:
                    gradient = _add(gradient, extend(logits, index + 1))
                gradients[index] = _add(gradients[index], gradient)
                if partial is not None:
                    sum_of_all = _add(sum_of_all, gradient)
            return sum_of_all

        extend(None, 0)
        if with_gradient:
            ctx.save_for_backward(*gradients)
        return total.to(levels[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        gradients = zip(needed, ctx.saved_tensors, strict=True)
        return None, None, *(g * upstream if need else None for need, g in gradients)


def _add(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second
