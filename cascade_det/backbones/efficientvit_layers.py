"""Layers of EfficientViT (arXiv 2305.07027), under the official state-dict names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from cascade_det.backbones.cascaded_attention import CascadedGroupAttention
from cascade_det.backbones.conv_bn import ConvBN
from cascade_det.layers.conv_norm import may_write_in_place


class Block(nn.Module):
    """Depthwise convolution, FFN, cascaded attention, depthwise convolution, FFN; all residual.

    Args:
        channels: C.
        heads: of the attention.
        kernels: of the attention, see ``CascadedGroupAttention``.
        window: of the attention, side in tokens.
    """

    def __init__(self, channels: int, *, heads: int, kernels: Sequence[int], window: int) -> None:
        super().__init__()
        attention = CascadedGroupAttention(channels, heads=heads, kernels=kernels, window=window)
        self.dw0 = Residual(_depthwise(channels, zero=True))
        self.ffn0 = Residual(FFN(channels))
        self.mixer = Residual(nn.Sequential(OrderedDict(attn=attention)))
        self.dw1 = Residual(_depthwise(channels, zero=True))
        self.ffn1 = Residual(FFN(channels))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape."""
        for layer in (self.dw0, self.ffn0, self.mixer, self.dw1, self.ffn1):
            x = layer(x)
        return x


class Residual(nn.Module):
    """``x + m(x)``."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape."""
        return x + self.m(x)


class FFN(nn.Module):
    """Two 1x1 convolutions, twice as many channels between them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pw1 = ConvBN(channels, 2 * channels)
        self.pw2 = ConvBN(2 * channels, channels, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape."""
        x = F.relu_(self.pw1(x))
        y: Tensor = self.pw2(x)
        return y


class PatchMerging(nn.Module):
    """Half the size, other channels: an inverted residual with squeeze-excite, no shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        hidden = 4 * in_channels
        self.conv1 = ConvBN(in_channels, hidden)
        self.conv2 = ConvBN(hidden, hidden, 3, stride=2, groups=hidden)
        self.se = SqueezeExcite(hidden)
        self.conv3 = ConvBN(hidden, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, K, ceil(H / 2), ceil(W / 2)]``."""
        x = F.relu_(self.conv1(x))
        x = F.relu_(self.conv2(x))
        y: Tensor = self.conv3(self.se(x))
        return y


class SqueezeExcite(nn.Module):
    """Channels scaled by a function of their means (arXiv 1709.01507)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # A quarter, to the nearest multiple of 8.
        hidden = max(8, (channels // 4 + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape; may write in place of ``x``."""
        scale = self.fc2(F.relu_(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()
        return x.mul_(scale) if may_write_in_place(x) else x * scale


def stem(channels: int) -> nn.Sequential:
    """Four 3x3 convolutions of stride 2, ReLU between them: ``[N, 3, H, W]`` to stride 16."""
    layers: list[nn.Module] = []
    widths = [3, channels // 8, channels // 4, channels // 2, channels]
    for i in range(4):
        layers += [ConvBN(widths[i], widths[i + 1], 3, stride=2), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


def between_stages(in_channels: int, out_channels: int) -> list[nn.Module]:
    """The layers that halve the map before the blocks of a stage."""
    before, after = (
        nn.Sequential(Residual(_depthwise(channels)), Residual(FFN(channels)))
        for channels in (in_channels, out_channels)
    )
    return [before, PatchMerging(in_channels, out_channels), after]


def _depthwise(channels: int, *, zero: bool = False) -> ConvBN:
    return ConvBN(channels, channels, 3, groups=channels, zero=zero)
