"""Convolutions and linear layers in 8 bits, by oneDNN's kernels for CPUs.

Static affine quantisation (arXiv 1712.05877, section 2): a value is ``scale * (q - zero_point)``,
with q unsigned in maps, and signed with one scale per output channel and no zero point in weights.

Shapes: N images, C input and K output channels.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Pixels that are converted at a time: they stay in the cache of a core.
_PIXELS = 4096


class Grid(NamedTuple):
    """The values that 8 bits stand for: ``scale * (q - zero_point)``, q from 0 to 255."""

    scale: float
    zero_point: int

    @classmethod
    def of_range(cls, low: float, high: float) -> Grid:
        """The finest grid from ``low`` to ``high`` that has 0 on it; values outside are clipped."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / 255, 1e-8)
        return cls(scale, round(-low / scale))


class QuantisedMap(NamedTuple):
    """A map in 8 bits.

    Attributes:
        values: uint8 ``[N, C, H, W]``, channels-last.
        grid: what they stand for.
    """

    values: Tensor
    grid: Grid

    def to(self, dtype: torch.dtype) -> Tensor:
        """The map as numbers of a floating-point type."""
        scale, zero_point = self.grid
        return self.values.to(torch.float32).sub_(zero_point).mul_(scale).to(dtype)


def quantise(x: Tensor, grid: Grid) -> Tensor:
    """Round ``[..., C]``, of any floating-point type, to uint8 of the same shape."""
    rows = x.reshape(-1, x.shape[-1])
    result = torch.empty(rows.shape, dtype=torch.uint8)
    for part, out in zip(rows.split(_PIXELS), result.split(_PIXELS), strict=True):
        # Conversion cuts off: half a step is added before.
        steps = part.float().mul(1 / grid.scale).add_(grid.zero_point + 0.5)
        out.copy_(steps.clamp_(0, 255))
    return result.view(x.shape)


def quantise_map(x: Tensor, grid: Grid) -> QuantisedMap:
    """Round ``[N, C, H, W]`` of any floating-point type."""
    pixels = quantise(x.permute(0, 2, 3, 1), grid)
    return QuantisedMap(pixels.permute(0, 3, 1, 2), grid)


class _Rounded(nn.Module):
    """Weights in 8 bits, also as oneDNN packs them, which can neither be copied nor pickled.

    None of them is a buffer: a change of the module's type must not reach them.

    Args:
        layer: whose weights are rounded; not changed.
        inputs: grid that an input is rounded to which is not in 8 bits yet.
        output: grid of the output, or its floating-point type.
        relu: whether a ReLU follows.
    """

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        inputs: Grid,
        *,
        output: Grid | torch.dtype = torch.float32,
        relu: bool = False,
    ) -> None:
        super().__init__()
        self.inputs, self.output = inputs, output
        self.activation = "relu" if relu else "none"
        self.weight, self.scales = _round_weight(layer.weight.detach().float())
        self.zero_points = torch.zeros(len(self.weight), dtype=torch.int32)
        self.bias = None if layer.bias is None else layer.bias.detach().float()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "packed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.pack()

    def pack(self) -> None:
        """Pack the weights: here those of a linear layer."""
        self.packed = torch.ops.onednn.qlinear_prepack(self.weight.flatten(1), None)

    def multiply_rows(self, rows: Tensor, grid: Grid) -> Tensor:
        """Apply a linear layer to uint8 ``[R, C]``; returns ``[R, K]``."""
        result: Tensor = torch.ops.onednn.qlinear_pointwise(
            *(rows, *grid, *self._weights, self.bias),
            *(*_output(self.output), self.activation, [], ""),
        )
        return result

    @property
    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.packed, self.scales, self.zero_points


class Int8Linear(_Rounded):
    """A linear layer for inference; arguments as of ``_Rounded``."""

    def __init__(self, linear: nn.Linear, inputs: Grid, **more: Any) -> None:
        super().__init__(linear, inputs, **more)
        self.pack()

    def forward(self, x: Tensor) -> Tensor:
        """``[R, C]`` to ``[R, K]``."""
        if torch.jit.is_tracing():  # fvcore counts plain layers
            return F.linear(x, (self.weight * self.scales[:, None]).to(x.dtype))
        return self.multiply_rows(quantise(x, self.inputs), self.inputs)


class Int8Conv2d(_Rounded):
    """A convolution without a norm, for inference; arguments as of ``_Rounded``."""

    def __init__(self, conv: nn.Conv2d, inputs: Grid, **more: Any) -> None:
        super().__init__(conv, inputs, **more)
        self.stride = conv.stride
        self.channels = conv.in_channels
        sides = (list(side) for side in (conv.stride, conv.padding, conv.dilation))
        self.geometry = (*sides, conv.groups)
        # oneDNN packs the weights of a 1x1 convolution for some sizes of maps, and is up to 20
        # times slower with others; those of a linear layer suit all.
        self.is_linear = conv.kernel_size == (1, 1) and conv.groups == 1
        self.pack()

    def pack(self) -> None:
        """Pack the weights."""
        if self.is_linear:
            super().pack()
            return
        shape = [1, self.channels, 64, 64]
        self.packed = torch.ops.onednn.qconv_prepack(
            self.weight, self.scales, *self.inputs, *self.geometry, shape
        )

    def forward(self, x: Tensor | QuantisedMap) -> Tensor | QuantisedMap:
        """``[N, C, H, W]`` to ``[N, K, H', W']``, channels-last."""
        values, grid = self._read(x)
        if self.is_linear:
            result = _map(self.multiply_rows(_rows(values), grid), values.shape)
        else:
            result = torch.ops.onednn.qconv2d_pointwise(
                *(values, *grid, *self._weights, self.bias, *self.geometry),
                *(*_output(self.output), self.activation, [], ""),
            )
        return QuantisedMap(result, self.output) if isinstance(self.output, Grid) else result

    def convolve_windows(self, windows: Tensor) -> Tensor:
        """Convolve windows without padding: ``[N, C, S, S]`` to ``[N, K, S - 2, S - 2]``."""
        stride, _, dilation, groups = self.geometry
        values, grid = quantise_map(windows, self.inputs)
        result: Tensor = torch.ops.onednn.qconv2d_pointwise(
            *(values, *grid, *self._weights, self.bias, stride, [0, 0], dilation, groups),
            *(*_output(self.output), self.activation, [], ""),
        )
        return result

    def add_to(self, shortcut: QuantisedMap, x: QuantisedMap) -> QuantisedMap:
        """The activation of ``shortcut + self(x)``; may overwrite ``shortcut``."""
        assert isinstance(self.output, Grid)
        values, grid = self._read(x)
        output = *self.output, torch.uint8, *shortcut.grid
        activation: tuple[Any, ...] = "sum", 1.0, self.activation, [], ""
        if self.is_linear:
            rows = torch.ops.onednn.qlinear_pointwise.binary(
                *(_rows(values), *grid, *self._weights, _rows(shortcut.values), self.bias),
                *output,
                *activation,
            )
            return QuantisedMap(_map(rows, values.shape), self.output)
        result = torch.ops.onednn.qconv2d_pointwise.binary(
            *(values, *grid, *self._weights, shortcut.values, self.bias),
            *self.geometry,
            *output,
            *activation,
        )
        return QuantisedMap(result, self.output)

    def _read(self, x: Tensor | QuantisedMap) -> QuantisedMap:
        """The input in 8 bits; for a strided 1x1 convolution the pixels that it reads."""
        values = x.values if isinstance(x, QuantisedMap) else x
        if self.is_linear and self.stride != (1, 1):
            values = values[:, :, :: self.stride[0], :: self.stride[1]]
        if not isinstance(x, QuantisedMap):
            return quantise_map(values, self.inputs)
        return QuantisedMap(values.contiguous(memory_format=torch.channels_last), x.grid)


def _output(output: Grid | torch.dtype) -> tuple[float, int, torch.dtype]:
    return (*output, torch.uint8) if isinstance(output, Grid) else (1.0, 0, output)


def _rows(values: Tensor) -> Tensor:
    """Channels-last ``[N, C, H, W]`` to ``[N H W, C]``, without a copy."""
    return values.permute(0, 2, 3, 1).flatten(0, 2)


def _map(rows: Tensor, shape: torch.Size) -> Tensor:
    """``[N H W, K]`` to channels-last ``[N, K, H, W]``; ``shape`` is that of the input."""
    return rows.view(shape[0], shape[2], shape[3], rows.shape[1]).permute(0, 3, 1, 2)


def _round_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 ``[K, ...]``, and the scales of its K channels."""
    scales = weight.flatten(1).abs().amax(dim=1).clamp(min=1e-12) / 127
    steps = weight / scales.view(-1, *[1] * (weight.dim() - 1))
    return steps.round_().to(torch.int8), scales


@cache
def multiplies_int8_exactly() -> bool:
    """Whether this CPU's products of 8 bits are exact.

    Without VNNI or AMX instructions sums of two products are clipped to 16 bits: 9.4 million
    instead of 18.7. Decided by products of extreme values.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(
        torch.ops.onednn, "qconv2d_pointwise"
    ):
        return False
    channels, one = 64, Grid(1.0, 0)
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    linear = nn.Linear(channels, channels)
    for layer in (conv, linear):
        nn.init.constant_(layer.weight, 127.0)
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
    values = torch.full((1, channels, 8, 8), 255, dtype=torch.uint8)
    values = values.contiguous(memory_format=torch.channels_last)
    product = 255 * 127 * channels
    convolved: Any = Int8Conv2d(conv, one)(QuantisedMap(values, one))
    rows = Int8Linear(linear, one).multiply_rows(_rows(values), one)
    return bool((convolved[..., 1:-1, 1:-1] == 9 * product).all() and (rows == product).all())
