"""Convolution and batch norm under EfficientViT's names."""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from cascade_det.layers.conv_norm import FrozenBatchNorm2d


class ConvBN(nn.Sequential):
    """A convolution ``c`` without bias and its batch norm ``bn``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: side of the kernel; padding keeps the size at stride 1.
        stride: in both directions.
        groups: groups of channels.
        zero: whether the output is zero at first, for the end of a residual.
    """

    c: nn.Conv2d
    bn: nn.Module

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        zero: bool = False,
    ) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.c = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)
        if zero:
            nn.init.zeros_(self.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, out_channels, H / stride, W / stride]``."""
        conv, norm = self.c, self.bn
        weight, bias = conv.weight, conv.bias
        if is_fixed := _is_fixed(norm):
            # Folded: equal up to rounding, without a pass over the map and a copy of it.
            weight, bias = _fold(weight, norm)
        if conv.groups == 1 and conv.kernel_size == (1, 1):
            # A matrix product on channels-last maps: faster on CPUs.
            y = F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
        else:
            y = F.conv2d(x, weight, bias, conv.stride, conv.padding, groups=conv.groups)
        return y if is_fixed else norm(y)


def _fold(weight: Tensor, norm: _BatchNorm | FrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    scale = norm.weight * (variance + norm.eps).rsqrt()
    return weight * scale.view(-1, 1, 1, 1), norm.bias - mean * scale


def _is_fixed(norm: nn.Module) -> TypeGuard[_BatchNorm | FrozenBatchNorm2d]:
    return isinstance(norm, FrozenBatchNorm2d) or (
        isinstance(norm, _BatchNorm) and not norm.training
    )
