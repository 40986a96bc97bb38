"""The CASCADE decoder: maps refined from coarse to fine through attention gates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cascade_det.backbones.decoder_blocks import (
    AttentionGate,
    ChannelAttention,
    ConvBlock,
    SpatialAttention,
    UpConv,
)

FUSIONS = ("add", "concat")


class CascadeDecoder(nn.Module):
    """Decodes maps of an encoder, each through the coarser decision before it.

    "Medical Image Segmentation via Cascaded Attention Decoding" (WACV 2023), section 3.1. Each
    level upsamples the coarser result, gates the encoder's map with it, fuses both, and applies
    channel attention, spatial attention and two convolutions. State-dict names are the official
    ones (``AG3.W_g.0.weight``); level 1 is the finest.

    Args:
        channels: of the encoder's maps, coarsest first, two or more; 16 or more each.
        fuse: ``add`` the gated map to the upsampled one, or ``concat`` them.
        finest_gate: channels inside the gate of the finest level; ``None`` is half of its channels
            (MERIT, arXiv 2303.16892), the published CASCADE has 32.

    Raises:
        ValueError: fewer than two levels, fewer than 16 channels, or an unknown ``fuse``.
    """

    def __init__(
        self, channels: Sequence[int], *, fuse: str = "add", finest_gate: int | None = None
    ) -> None:
        super().__init__()
        if len(channels) < 2:
            raise ValueError(f"a decoder needs two levels or more: channels {tuple(channels)}")
        if fuse not in FUSIONS:
            raise ValueError(f"unknown fuse {fuse!r}; known: {', '.join(FUSIONS)}")
        self.channels = tuple(channels)
        self.fuse = fuse
        top = len(channels)
        self.Conv_1x1 = nn.Conv2d(channels[0], channels[0], 1)
        self.SA = SpatialAttention()  # shared by all levels
        for level, width in zip(range(top, 0, -1), channels, strict=True):
            fused = width
            if level < top:
                finer = channels[top - level + 1] if level > 1 else finest_gate or width // 2
                self.add_module(f"Up{level}", UpConv(channels[top - level - 1], width))
                self.add_module(f"AG{level}", AttentionGate(width, finer))
                fused = width * (2 if fuse == "concat" else 1)
            self.add_module(f"CA{level}", ChannelAttention(fused))
            self.add_module(f"ConvBlock{level}", ConvBlock(fused, width))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps ``[N, C_l, H_l, W_l]`` of any sizes, coarsest first, to maps of the same shapes."""
        decoded = [self.start(maps[0])]
        for level, skip in zip(range(len(maps) - 1, 0, -1), maps[1:], strict=True):
            decoded.append(self.refine(level, decoded[-1], skip))
        return decoded

    def start(self, coarsest: Tensor) -> Tensor:
        """The coarsest level: the encoder's map to the decoded one, of the same shape."""
        return self._attend(len(self.channels), self.Conv_1x1(coarsest))

    def refine(self, level: int, coarser: Tensor, skip: Tensor) -> Tensor:
        """One level: the decoded map before it, and the encoder's, to one of its shape."""
        return self._attend(level, self.fused(level, coarser, skip))

    def fused(self, level: int, coarser: Tensor, skip: Tensor) -> Tensor:
        """The map of a level before its attention: ``[N, C_l, H_l, W_l]``, 2 C_l by ``concat``."""
        up = self.get_submodule(f"Up{level}")(coarser, skip.shape[-2:])
        gated = self.get_submodule(f"AG{level}")(up, skip)
        # The gated map first, as published.
        return torch.cat([gated, up], dim=1) if self.fuse == "concat" else gated + up

    def _attend(self, level: int, x: Tensor) -> Tensor:
        x = x * self.get_submodule(f"CA{level}")(x)
        x = x * self.SA(x)
        decoded: Tensor = self.get_submodule(f"ConvBlock{level}")(x)
        return decoded
