"""Attention with several heads over sequences of tokens."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, heads: int, bias: Tensor | None = None
) -> Tensor:
    """Scaled dot-product attention (arXiv 1706.03762, section 3.2), heads being parts of C.

    Args:
        queries: ``[B, Q, C]``.
        keys: ``[B, K, C]``.
        values: ``[B, K, C]``.
        heads: h.
        bias: ``[h, Q, K]``, added to the scores.

    Returns:
        ``[B, Q, C]``.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (queries, keys, values))
    mask = None if bias is None else bias[None].to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(-2)
