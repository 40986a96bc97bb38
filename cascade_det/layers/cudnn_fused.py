"""Convolution, bias, sum and ReLU in one call of cuDNN, for inference on GPUs.

PyTorch's convolution of a GPU leaves the bias, a sum and ReLU to kernels of their own, each of
which reads and writes the whole map again.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_SIDE = 8  # of the map that a kind of convolution is tried on, in pixels
# Far above rounding of bfloat16 and TF32, far below what a wrong kernel would differ by.
_LARGEST_DIFFERENCE = 0.05


def fused_relu(x: Tensor, conv: nn.Conv2d, shortcut: Tensor | None = None) -> Tensor | None:
    """``relu(conv(x))`` or ``relu(conv(x) + shortcut)`` in one call of cuDNN.

    Each kind of convolution is first tried on a small map, since which of them cuDNN has depends on
    GPU and type.

    Args:
        x: ``[N, C, H, W]``.
        conv: without norm.
        shortcut: of the shape of ``conv(x)``; it stays as it is.

    Returns:
        ``[N, K, h, w]``; ``None`` where one call is not possible.
    """
    if not _is_eligible(x, conv, shortcut):
        return None
    geometry = tuple(conv.stride), tuple(int(side) for side in conv.padding), tuple(conv.dilation)
    if not has_fused(x.device, x.dtype, tuple(conv.weight.shape), geometry, shortcut is not None):
        return None
    return _call(x, conv.weight, conv.bias, shortcut, geometry)


_Pair = tuple[int, ...]


@cache
def has_fused(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    geometry: tuple[_Pair, _Pair, _Pair],
    adds: bool,
) -> bool:
    """Whether cuDNN has a kernel for a kind of convolution, which computes what two calls do.

    Args:
        device: a GPU.
        dtype: of maps and weights.
        shape: of the weights, ``[K, C, s, s]``.
        geometry: stride, padding and dilation.
        adds: whether a map is added before ReLU.
    """

    def waves(*sizes: int) -> Tensor:
        """Numbers in -1 to 1 that take none from a random generator."""
        numbers = torch.arange(torch.Size(sizes).numel(), device=device, dtype=torch.float32)
        return (numbers * 0.7).sin().view(sizes)

    def maps(numbers: Tensor) -> Tensor:
        return numbers.to(dtype).contiguous(memory_format=torch.channels_last)

    with torch.no_grad():
        x = maps(waves(1, shape[1], _SIDE, _SIDE))
        weight = maps(waves(*shape) / (shape[1] * shape[2] * shape[3]) ** 0.5)
        bias = waves(shape[0]).to(dtype)
        convolved = F.conv2d(x, weight, bias, *geometry)
        shortcut = maps(waves(*convolved.shape)) if adds else None
        try:
            found = _call(x, weight, bias, shortcut, geometry)
        except RuntimeError:  # no kernel for this GPU, type or shape
            return False
        wanted = convolved if shortcut is None else convolved + shortcut
        difference = (found.float() - wanted.float().relu()).abs().max()
        return bool(difference < _LARGEST_DIFFERENCE)


def _is_eligible(x: Tensor, conv: nn.Conv2d, shortcut: Tensor | None) -> bool:
    weight = conv.weight
    return (
        x.device.type == "cuda"
        and x.dtype in _DTYPES
        and x.dtype == weight.dtype
        and (shortcut is None or shortcut.dtype == x.dtype)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cuda")
        and not (torch.jit.is_tracing() or torch.compiler.is_compiling())
        and torch.backends.cudnn.is_available()
        and torch.backends.cudnn.enabled
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and conv.bias is not None
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        # Tensor cores read channels in eights.
        and weight.shape[0] % 8 == weight.shape[1] % 8 == 0
        # These would not run.
        and not (conv._forward_hooks or conv._forward_pre_hooks)
    )


def _call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shortcut: Tensor | None,
    geometry: tuple[_Pair, _Pair, _Pair],
) -> Tensor:
    if shortcut is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry, 1)
    return torch.cudnn_convolution_add_relu(x, weight, shortcut, 1.0, bias, *geometry, 1)
