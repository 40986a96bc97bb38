"""Cascaded group attention of EfficientViT, arXiv 2305.07027, section 3.1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascade_det.backbones.conv_bn import ConvBN
from cascade_det.backbones.relative_bias import RelativeBias
from cascade_det.backbones.windows import join_windows, pad_to_multiple, split_windows

KEY_CHANNELS = 16


class CascadedGroupAttention(RelativeBias):
    """Attention in windows whose heads each see a group of channels and the head before.

    Head ``i`` takes the ``i``-th group of channels plus the output of head ``i - 1``. Maps are
    padded with zeros, right and bottom, to multiples of the window. Padded tokens are tokens: they
    take part in the attention, and in the statistics of norms.

    Args:
        channels: C, a multiple of ``heads``.
        heads: h.
        kernels: side of the depthwise convolution of the queries, head by head; at least h.
        window: side of the window in tokens.

    Raises:
        ValueError: if there are fewer kernels than heads.
    """

    def __init__(self, channels: int, *, heads: int, kernels: Sequence[int], window: int) -> None:
        super().__init__(heads, window, signed=False)
        if len(kernels) < heads:
            raise ValueError(f"{heads} heads need as many kernels, not {tuple(kernels)}")
        self.window = window
        self.sizes = [KEY_CHANNELS, KEY_CHANNELS, channels // heads]  # of query, key, value
        self.qkvs = nn.ModuleList(ConvBN(channels // heads, sum(self.sizes)) for _ in range(heads))
        self.dws = nn.ModuleList(
            ConvBN(KEY_CHANNELS, KEY_CHANNELS, kernel, groups=KEY_CHANNELS)
            for kernel in kernels[:heads]
        )
        self.proj = nn.Sequential(nn.ReLU(inplace=True), ConvBN(channels, channels, zero=True))

    def forward(self, maps: Tensor) -> Tensor:
        """``[N, C, H, W]`` of any size to the same shape."""
        height, width = maps.shape[-2:]
        padded = pad_to_multiple(maps, self.window)
        rows, columns = padded.shape[-2:]
        tokens = split_windows(padded.permute(0, 2, 3, 1), self.window)  # [windows, w^2, C]
        if torch.compiler.is_compiling():
            # One more window: an export assumes that a convolution has a batch of two or more.
            attended = self._attend(F.pad(tokens, (0, 0, 0, 0, 0, 1)))[:-1]
        else:
            attended = self._attend(tokens)
        mixed = self._tokens(self.proj(self._windows(attended)))
        joined = join_windows(mixed, self.window, rows, columns)
        return joined.permute(0, 3, 1, 2)[..., :height, :width]

    def _attend(self, tokens: Tensor) -> Tensor:
        """Outputs of all heads, one after another: ``[windows, w^2, C]`` to the same shape."""
        biases = self.bias()
        outputs: list[Tensor] = []
        for i, group in enumerate(tokens.chunk(len(self.qkvs), dim=2)):
            x = group + outputs[-1] if outputs else group
            qkv = self._tokens(self.qkvs[i](self._windows(x)))
            query, key, value = qkv.split(self.sizes, dim=2)
            query = self._tokens(self.dws[i](self._windows(query)))
            # Not the fused attention of PyTorch: slower for so few tokens.
            scores = torch.baddbmm(
                biases[i], query, key.transpose(1, 2), alpha=KEY_CHANNELS**-0.5
            )  # [windows, w^2, w^2]
            outputs.append(torch.bmm(scores.softmax(dim=2), value))
        return torch.cat(outputs, dim=2)

    def _windows(self, tokens: Tensor) -> Tensor:
        """``[windows, w^2, C]`` as channels-last maps ``[windows, C, w, w]``."""
        return tokens.unflatten(1, (self.window, self.window)).permute(0, 3, 1, 2)

    def _tokens(self, windows: Tensor) -> Tensor:
        """The inverse of ``_windows``."""
        return windows.permute(0, 2, 3, 1).flatten(1, 2)
