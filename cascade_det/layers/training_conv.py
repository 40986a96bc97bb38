"""Convolutions with a faster backward pass on CPUs.

Shapes: N images, C input and K output channels, ``[H, W]`` of the input, ``[h, w]`` of the output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def training_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
) -> Tensor:
    """``F.conv2d`` with a faster backward pass on CPUs; bit-equal to it elsewhere.

    Two kinds of convolution are slow in PyTorch. A strided 1x1 convolution becomes an unstrided
    one on every ``stride``-th pixel. The weight gradient of a larger kernel on a channels-last map
    becomes one matrix product per kernel position.

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[K, C / groups, s, s]``.
        bias: ``[K]``.
        stride: in both directions.
        padding: zeros on all four sides.
        groups: of channels.

    Returns:
        ``[N, K, h, w]``.
    """
    if x.device.type == "cpu" and not padding and weight.shape[2] == 1 and stride > 1:
        x, stride = x[:, :, ::stride, ::stride], 1
    if _is_slow(x, weight, stride, groups):
        output: Tensor = _Convolution.apply(x, weight, bias, padding)
        return output
    return F.conv2d(x, weight, bias, stride, padding, groups=groups)


def _is_slow(x: Tensor, weight: Tensor, stride: int, groups: int) -> bool:
    return (
        x.device.type == "cpu"
        and weight.requires_grad
        and weight.shape[2] > 1
        and stride == groups == 1
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.is_contiguous(memory_format=torch.channels_last)
    )


class _Convolution(torch.autograd.Function):
    """A convolution of stride 1 over a channels-last map."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return F.conv2d(x, weight, bias, padding=padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        return (
            _input_gradient(gradient, x, weight, ctx.padding) if needs_x else None,
            _weight_gradient(gradient, x, weight.shape, ctx.padding) if needs_weight else None,
            gradient.sum((0, 2, 3)) if needs_bias else None,
            None,
        )


def _input_gradient(gradient: Tensor, x: Tensor, weight: Tensor, padding: int) -> Tensor:
    x_gradient: Tensor = torch.ops.aten.convolution_backward(
        gradient,
        x,
        weight,
        None,
        [1, 1],
        [padding, padding],
        [1, 1],
        False,
        [0, 0],
        1,
        [True, False, False],
    )[0]
    return x_gradient


def _weight_gradient(gradient: Tensor, x: Tensor, shape: torch.Size, padding: int) -> Tensor:
    """The gradient of weights ``[K, C, s, s]``, by matrix products on views of two maps.

    Input and output gradient are padded to the same width. The input pixel of a kernel position
    then lies a constant number of rows ahead of its output pixel in the flattened maps.
    """
    height, width = shape[2:]
    # [N, H + 2 padding, W + 2 padding, C], and the gradient as [N, ..., K] of the same size.
    pixels = F.pad(x, (padding,) * 4).permute(0, 2, 3, 1)
    outputs = F.pad(gradient, (0, width - 1, 0, height - 1)).permute(0, 2, 3, 1)
    row = pixels.shape[2]
    pixels, outputs = pixels.reshape(-1, shape[1]), outputs.reshape(-1, shape[0])
    offsets = [i * row + j for i in range(height) for j in range(width)]
    products = [outputs[: len(outputs) - ahead].T @ pixels[ahead:] for ahead in offsets]  # [K, C]
    return torch.stack(products, dim=2).view(shape)
