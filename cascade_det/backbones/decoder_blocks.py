"""Blocks of the CASCADE decoder, under the official state-dict names.

"Medical Image Segmentation via Cascaded Attention Decoding" (WACV 2023), section 3.1.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

REDUCTION = 16  # of the channels inside channel attention


class AttentionGate(nn.Module):
    """Lets a skip map through where a coarser map wants it (arXiv 1804.03999, section 2).

    Args:
        channels: C of both maps.
        hidden: channels in which they are compared.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.W_g = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.BatchNorm2d(hidden))
        self.W_x = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.BatchNorm2d(hidden))
        self.psi = nn.Sequential(nn.Conv2d(hidden, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())

    def forward(self, coarser: Tensor, skip: Tensor) -> Tensor:
        """The upsampled coarser map and the skip, both ``[N, C, H, W]``, to the gated skip."""
        gated: Tensor = skip * self.psi(F.relu(self.W_g(coarser) + self.W_x(skip)))
        return gated


class ChannelAttention(nn.Module):
    """A gate per channel from its mean and its maximum (CBAM, arXiv 1807.06521, section 3.1).

    Args:
        channels: C, at least ``REDUCTION``.

    Raises:
        ValueError: fewer channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < REDUCTION:
            raise ValueError(f"channel attention needs {REDUCTION} channels or more: {channels}")
        self.fc1 = nn.Conv2d(channels, channels // REDUCTION, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // REDUCTION, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to gates ``[N, C, 1, 1]``."""
        pooled = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        return sum(self.fc2(F.relu(self.fc1(vector))) for vector in pooled).sigmoid()


class SpatialAttention(nn.Module):
    """A gate per pixel from the mean and maximum over channels (arXiv 1807.06521, section 3.2)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to gates ``[N, 1, H, W]``."""
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        gates: Tensor = self.conv1(pooled).sigmoid()
        return gates


class ConvBlock(nn.Module):
    """Two 3x3 convolutions, each with batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            layers.append(nn.Conv2d(channels, out_channels, 3, padding=1))
            layers += [nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, out_channels, H, W]``."""
        y: Tensor = self.conv(x)
        return y


class UpConv(nn.Module):
    """Nearest neighbours, and a 3x3 convolution with batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        # The official names count the upsampling as layer 0.
        self.up = nn.Sequential(OrderedDict({"1": conv, "2": nn.BatchNorm2d(out_channels)}))

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, out_channels, *size]``; by default twice the size."""
        scale = 2.0 if size is None else None
        return F.relu_(self.up(F.interpolate(x, size, scale_factor=scale, mode="nearest")))
