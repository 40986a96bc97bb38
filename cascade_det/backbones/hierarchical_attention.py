"""Hierarchical multi-head self-attention: inside small grids first, then to the pooled map."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascade_det.backbones.attention import attend
from cascade_det.backbones.windows import join_windows, pad_to_multiple, split_windows


def whole_map_norm(channels: int) -> nn.GroupNorm:
    """Group norm with a single group: statistics of all channels and pixels of an image."""
    return nn.GroupNorm(1, channels, eps=1e-6)


class HierarchicalAttention(nn.Module):
    """H-MHSA of HAT-Net (arXiv 2106.03180, section 3), without a shortcut.

    A map is cut into grids, inside which its tokens attend to each other. The result, added to the
    map, attends to its own average-pooled copy. With grids of 1 there is one plain attention
    of all tokens instead.

    The official network takes only maps that consist of whole grids. Here the normalised map is
    padded with zeros, right and bottom. Padded tokens are not masked: their queries, keys and
    values are the biases of ``qkv``. A map smaller than the pooling is pooled by its own side,
    except in an exported or compiled network.

    Args:
        channels: C, a multiple of ``head_width``.
        head_width: channels per head.
        grid: G, side of a grid in tokens.
        pooling: side of the pooled areas in tokens; a remainder is dropped.
    """

    def __init__(self, channels: int, *, head_width: int, grid: int, pooling: int) -> None:
        super().__init__()
        self.heads, self.grid, self.pooling = channels // head_width, grid, pooling
        self.norm = whole_map_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        if grid > 1:
            self.grid_norm = whole_map_norm(channels)
            self.ds_norm = whole_map_norm(channels)
            self.q = nn.Conv2d(channels, channels, 1)
            self.kv = nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape."""
        if self.grid == 1:
            attended = self._attend_each_other(_to_tokens(self.norm(x)))
        else:
            x = self.grid_norm(x + self._attention_in_grids(x))
            tokens = _to_tokens(x)
            pooled = _to_tokens(self.ds_norm(self._pool(x)))
            keys, values = _project(pooled, self.kv).chunk(2, dim=2)
            attended = tokens + attend(_project(tokens, self.q), keys, values, self.heads)
        return _project(attended, self.proj).transpose(1, 2).unflatten(2, x.shape[2:])

    def _attention_in_grids(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        padded = pad_to_multiple(self.norm(x), self.grid).permute(0, 2, 3, 1)
        attended = self._attend_each_other(split_windows(padded, self.grid))
        joined = join_windows(attended, self.grid, *padded.shape[1:3])
        return joined[:, :height, :width].permute(0, 3, 1, 2)

    def _pool(self, x: Tensor) -> Tensor:
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return F.avg_pool2d(x, self.pooling)  # a smaller side would be fixed
        height, width = (min(self.pooling, side) for side in x.shape[2:])
        return F.avg_pool2d(x, (height, width))

    def _attend_each_other(self, tokens: Tensor) -> Tensor:
        """Normalised tokens ``[B, T, C]`` to the same shape."""
        queries, keys, values = _project(tokens, self.qkv).chunk(3, dim=2)
        return attend(queries, keys, values, self.heads)


def _to_tokens(maps: Tensor) -> Tensor:
    """``[N, C, H, W]`` to ``[N, H * W, C]``."""
    return maps.flatten(2).transpose(1, 2)


def _project(tokens: Tensor, conv: nn.Conv2d) -> Tensor:
    """Tokens ``[B, T, C]`` by a 1x1 convolution to ``[B, T, K]``."""
    return F.linear(tokens, conv.weight.flatten(1), conv.bias)
