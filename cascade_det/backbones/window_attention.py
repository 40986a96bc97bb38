"""Attention inside square windows with relative biases."""

from __future__ import annotations

from torch import Tensor, nn

from cascade_det.backbones.attention import attend
from cascade_det.backbones.relative_bias import RelativeBias


class WindowAttention(RelativeBias):
    """Attention among the tokens of each window (Swin, arXiv 2103.14030, section 3.2, no shift).

    Args:
        width: C.
        heads: h.
        window: w, side of a window in tokens.
    """

    def __init__(self, *, width: int, heads: int, window: int) -> None:
        super().__init__(heads, window, signed=True)
        self.heads = heads
        self.tokens = window**2
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[N, T, C]`` to the same shape; every ``w^2`` tokens in turn are a window."""
        queries, keys, values = (
            self.qkv(tokens).view(-1, self.tokens, 3 * tokens.shape[-1]).chunk(3, dim=-1)
        )
        return self.proj(attend(queries, keys, values, self.heads, self.bias()).view(tokens.shape))
