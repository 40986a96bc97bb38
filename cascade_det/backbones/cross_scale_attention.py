"""Attention from the tokens of a scale to those of all finer ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cascade_det.backbones.attention import attend
from cascade_det.backbones.windows import join_windows, split_windows


class CrossScaleAttention(nn.Module):
    """Windows of one map attend to the aligned windows of finer maps, with one softmax over all.

    A window of w x w tokens sees the ``(w r)^2`` tokens of a map that is r times as fine, the ones
    of the same part of the image. Each finer map has its own norm and projection to keys and
    values. The bias of that projection is the learned embedding of its scale: it is what keys and
    values of a scale have in common.

    Args:
        width: C, of the queries.
        heads: h.
        window: w.
        finer: width and ratio r of each finer map.
    """

    def __init__(
        self, *, width: int, heads: int, window: int, finer: Sequence[tuple[int, int]]
    ) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.ratios = [ratio for _, ratio in finer]
        self.norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.finer_norms = nn.ModuleList(nn.LayerNorm(channels) for channels, _ in finer)
        self.kv = nn.ModuleList(nn.Linear(channels, 2 * width) for channels, _ in finer)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, *finer: Tensor) -> Tensor:
        """What attention adds to ``x``.

        Args:
            x: ``[N, H, W, C]``, sides multiples of w.
            finer: one ``[N, r H, r W, C_t]`` for each finer map.

        Returns:
            ``[N, H, W, C]``.
        """
        queries = self.q(self.norm(split_windows(x, self.window)))
        # Windows are cut before the projection, where a token has fewer channels to copy.
        keys_and_values = torch.cat(
            [
                kv(norm(split_windows(maps, self.window * ratio)))
                for maps, ratio, norm, kv in zip(
                    finer, self.ratios, self.finer_norms, self.kv, strict=True
                )
            ],
            dim=1,
        )
        keys, values = keys_and_values.chunk(2, dim=-1)
        found = self.proj(attend(queries, keys, values, self.heads))
        return join_windows(found, self.window, *x.shape[1:3])
