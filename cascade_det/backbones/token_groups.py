"""Attention over a long sequence of tokens in groups, one group after another."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from cascade_det.backbones.attention import attend


class TokenGroupAttention(nn.Module):
    """Cascaded attention in G groups of tokens; defined here, there is no published network.

    N tokens in raster order are G contiguous groups: group g has the tokens from ``g N // G`` up to
    ``(g + 1) N // G``, so that sizes differ by one at most. Each group has a summary. If there are
    fewer tokens than groups, each token is one.

    1. Summaries begin as the mean of the tokens of their group and attend to each other, with a
       residual: ``S = S + proj(attention(S))``.
    2. For each group in turn, its tokens attend to themselves and to all G summaries, with one
       softmax: ``O_g = proj(attention(q of X_g; k, v of [X_g, S]))``. This is the output.
    3. The summary of the group becomes the mean of ``O_g``, so that later groups see what this one
       found. From groups behind them tokens know the first summaries only.

    All steps share one projection to queries, keys and values and one of the output. There is no
    bias by position.

    Scores per head: ``G^2 + sum of n_g (n_g + G)``, about ``N^2 / G + G N`` instead of ``N^2``.
    That is the memory of a training step which stores its scores. Without gradients, those of one
    group exist at a time. Fused attention stores none.

    Args:
        width: C.
        heads: h.
        groups: G.
    """

    def __init__(self, *, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.groups = groups
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, N, C]`` to the same shape, for any N from 1 up."""
        count, width = tokens.shape[1:]
        number = min(self.groups, count)
        bounds = [count * group // number for group in range(number + 1)]
        groups = list(itertools.pairwise(bounds))
        qkv = self.qkv(tokens)
        means = [tokens[:, begin:end].mean(1, keepdim=True) for begin, end in groups]
        summaries = torch.cat(means, dim=1)
        queries, keys, values = self.qkv(summaries).chunk(3, dim=-1)
        summaries = summaries + self.proj(attend(queries, keys, values, self.heads))
        # [B, 1, 2 C] per group: its keys and values.
        seen = list(self._keys_and_values(summaries).split(1, dim=1))
        outputs = []
        for group, (begin, end) in enumerate(groups):
            queries, own = qkv[:, begin:end].split([width, 2 * width], dim=-1)
            keys, values = torch.cat([own, *seen], dim=1).chunk(2, dim=-1)
            outputs.append(self.proj(attend(queries, keys, values, self.heads)))
            seen[group] = self._keys_and_values(outputs[-1].mean(1, keepdim=True))
        return torch.cat(outputs, dim=1)

    def _keys_and_values(self, summaries: Tensor) -> Tensor:
        width = summaries.shape[-1]
        return nn.functional.linear(summaries, self.qkv.weight[width:], self.qkv.bias[width:])
