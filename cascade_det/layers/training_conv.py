"""Convolutions that train fast on CPUs, where PyTorch's own lose time in the backward pass.

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
    """``F.conv2d`` with a faster way back on CPUs; elsewhere the same to the last bit.

    Two kinds of convolution are the slow ones. A strided 1x1 one is its plain self on every
    ``stride``-th pixel. And the gradient of a larger kernel's weights on a channels-last map is a
    sum of matrix products, one for each of the kernel's places.

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
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        return (
            _input_gradient(gradient, x, weight, ctx.padding) if of_x else None,
            _weight_gradient(gradient, x, weight.shape, ctx.padding) if of_weight else None,
            gradient.sum((0, 2, 3)) if of_bias else None,
            None,
        )


def _input_gradient(gradient: Tensor, x: Tensor, weight: Tensor, padding: int) -> Tensor:
    of_x: Tensor = torch.ops.aten.convolution_backward(
        gradient,
        x,
        weight,
        None,
        *([1, 1], [padding, padding], [1, 1], False, [0, 0], 1),
        [True, False, False],
    )[0]
    return of_x


def _weight_gradient(gradient: Tensor, x: Tensor, shape: torch.Size, padding: int) -> Tensor:
    """The gradient of weights ``[K, C, s, s]`` as products of matrices without a copy for each.

    With the padded map and the gradient in rows of equal length, the pixel that a place of the
    kernel sees lies the same number of rows ahead of its output, wherever that is.
    """
    height, width = shape[2:]
    pixels = F.pad(x, (padding,) * 4).permute(0, 2, 3, 1)
    outputs = F.pad(gradient, (0, width - 1, 0, height - 1)).permute(0, 2, 3, 1)
    row = pixels.shape[2]
    pixels, outputs = pixels.reshape(-1, shape[1]), outputs.reshape(-1, shape[0])
    places = [i * row + j for i in range(height) for j in range(width)]
    products = [outputs[: len(outputs) - ahead].T @ pixels[ahead:] for ahead in places]
    return torch.stack(products, dim=2).view(shape)
