"""Learned biases of attention scores by the offset between two tokens of a window."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RelativeBias(nn.Module):
    """Base of attention over square windows: a bias per head and offset.

    Offsets are signed, a table of ``(2 w - 1)^2`` entries (Swin, arXiv 2103.14030, section 3.2), or
    absolute, ``w^2`` entries, so that mirror images share one (EfficientViT, arXiv 2305.07027).

    Args:
        heads: h.
        window: w, side of the window in tokens.
        signed: whether an offset has a sign.

    Attributes:
        attention_biases: ``[h, entries]``, zeros at first. An optimiser does not decay it.
    """

    def __init__(self, heads: int, window: int, *, signed: bool) -> None:
        super().__init__()
        side = 2 * window - 1 if signed else window
        self.attention_biases = nn.Parameter(torch.zeros(heads, side * side))
        position = torch.arange(window)
        offset = position[:, None] - position  # [w, w]
        offset = offset + window - 1 if signed else offset.abs()
        index = offset[:, None, :, None] * side + offset[None, :, None, :]  # [w, w, w, w]
        self.index: Tensor
        self.register_buffer("index", index.reshape(window**2, window**2), persistent=False)
        self.gathered: Tensor | None
        self.register_buffer("gathered", None, persistent=False)

    def bias(self) -> Tensor:
        """``[h, w^2, w^2]``: head, query, key; tokens row by row."""
        if self.gathered is not None:
            return self.gathered
        return self.attention_biases[:, self.index]

    def gather_biases(self) -> None:
        """Gather the biases once, for inference: later changes of the table have no effect."""
        self.gathered = self.bias().detach()


def gather_biases(module: nn.Module) -> int:
    """Gather the biases of every attention inside ``module`` for inference; returns their count."""
    found = [child for child in module.modules() if isinstance(child, RelativeBias)]
    for child in found:
        child.gather_biases()
    return len(found)
