"""The convolutional head of an RPN, and the selection of its best anchors.

Shapes: N images, L levels, C channels, A anchors at each position, M = H W A anchors of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascade_det.layers.conv_norm import convolved_relu

# Positions whose features are converted to float32 at a time.
_POSITIONS = 16384


class BestAnchors(NamedTuple):
    """The best K anchors of one level, best objectness first.

    Attributes:
        logits: float32 ``[N, K]``, objectness.
        anchor_index: int64 ``[N, K]``, among the M anchors of the level.
        deltas: ``[N, K, 4]``.
    """

    logits: Tensor
    anchor_index: Tensor
    deltas: Tensor


def best_anchors(logits: Tensor, deltas: Tensor, most: int) -> BestAnchors:
    """The ``most`` best anchors of one level, or all if there are fewer.

    Args:
        logits: ``[N, M]``.
        deltas: ``[N, M, 4]``.
        most: upper bound of K.
    """
    top, index = logits.float().topk(min(most, logits.shape[1]), dim=1)
    return BestAnchors(top, index, deltas.gather(1, index[..., None].expand(-1, -1, 4)))


class RPNHead(nn.Module):
    """3x3 convolution(s) shared by the levels, then objectness and deltas of each anchor.

    Args:
        in_channels: C of the levels.
        num_anchors: A.
        conv_dims: output channels of the convolutions; -1 keeps the number.

    Attributes:
        topk_deltas_only: whether ``best`` computes the deltas of the best anchors only, with both
            last layers in float32. For inference; rounding differs from that of whole maps.
    """

    def __init__(
        self, *, in_channels: int, num_anchors: int, conv_dims: Sequence[int] = (-1,)
    ) -> None:
        super().__init__()
        convs: list[nn.Conv2d] = []
        channels = in_channels
        for width in conv_dims:
            out_channels = channels if width == -1 else width
            convs.append(nn.Conv2d(channels, out_channels, 3, padding=1))
            channels = out_channels
        if len(convs) == 1:
            self.conv: nn.Module = convs[0]
        else:
            self.conv = nn.Sequential()
            for i, conv in enumerate(convs):
                self.conv.add_module(f"conv{i}", conv)
        self.objectness_logits = nn.Conv2d(channels, num_anchors, 1)
        self.anchor_deltas = nn.Conv2d(channels, num_anchors * 4, 1)
        self.topk_deltas_only = False
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)

    @property
    def convs(self) -> tuple[nn.Module, ...]:
        """The 3x3 convolutions, in order."""
        return tuple(self.conv) if isinstance(self.conv, nn.Sequential) else (self.conv,)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """L maps ``[N, C, H_l, W_l]`` to logits ``[N, M_l]`` and deltas ``[N, M_l, 4]``."""
        logits, deltas = [], []
        for x in features:
            hidden = self._hidden(x)
            # [N, A, H, W] -> [N, H W A]
            logits.append(self.objectness_logits(hidden).permute(0, 2, 3, 1).flatten(1))
            # [N, A 4, H, W] -> [N, A, 4, H, W] -> [N, H, W, A, 4] -> [N, H W A, 4]
            level_deltas = self.anchor_deltas(hidden).unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2)
            deltas.append(level_deltas.flatten(1, 3))
        return logits, deltas

    def best(self, features: Sequence[Tensor], most: int) -> list[BestAnchors]:
        """The ``most`` best anchors of each of L maps ``[N, C, H_l, W_l]``."""
        if self.topk_deltas_only:
            return [self._best_with_deltas(self._hidden(x), most) for x in features]
        logits, deltas = self(features)
        return [best_anchors(x, d, most) for x, d in zip(logits, deltas, strict=True)]

    def _hidden(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = convolved_relu(x, conv)
        return x

    def _best_with_deltas(self, hidden: Tensor, most: int) -> BestAnchors:
        num_anchors = self.objectness_logits.out_channels
        # [N, H W, C], without a copy if the map is channels-last
        pixels = hidden.permute(0, 2, 3, 1).flatten(1, 2)
        # Compiled, the number of pieces would tie the code to few sizes.
        most_at_once = pixels.shape[1] if torch.compiler.is_compiling() else _POSITIONS
        parts = [_per_pixel(self.objectness_logits, p) for p in pixels.split(most_at_once, dim=1)]
        logits = torch.cat(parts, dim=1).flatten(1)
        top, index = logits.topk(min(most, logits.shape[1]), dim=1)  # [N, K]
        images = torch.arange(len(pixels), device=pixels.device)[:, None]
        deltas = _per_pixel(self.anchor_deltas, pixels[images, index // num_anchors])
        anchor = (index % num_anchors)[..., None, None].expand(-1, -1, 1, 4)  # [N, K, 1, 4]
        # [N, K, A 4] -> [N, K, A, 4] -> [N, K, 4]
        return BestAnchors(top, index, deltas.unflatten(2, (-1, 4)).gather(2, anchor).squeeze(2))


def _per_pixel(conv: nn.Conv2d, pixels: Tensor) -> Tensor:
    """A 1x1 convolution of pixels ``[N, P, C]``, in the type of its weights."""
    return F.linear(pixels.to(conv.weight.dtype), conv.weight.flatten(1), conv.bias)
