"""3x3 convolutions of small windows that have their border with them.

Shapes: K windows, C channels in, D out, S cells per side of a window.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from cascade_det.layers.conv_norm import ConvNorm, FrozenBatchNorm2d
from cascade_det.layers.int8 import Int8Conv2d
from cascade_det.layers.winograd import WinogradConv2d

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)


def takes_windows(conv: nn.Module) -> bool:
    """Whether ``convolve_windows`` computes what ``conv`` does.

    That is a 3x3 convolution of stride 1 and padding 1 in evaluation mode, whose norm, if any,
    treats each cell alone.
    """
    if isinstance(conv, Int8Conv2d):
        return conv.geometry == ([1, 1], [1, 1], [1, 1], 1) and not conv.is_linear
    if isinstance(conv, WinogradConv2d):
        return _is_cellwise(conv.norm)
    plain = isinstance(conv, ConvNorm) or type(conv) is nn.Conv2d
    return (
        plain
        and isinstance(conv, nn.Conv2d)
        and conv.kernel_size == (3, 3)
        and conv.stride == conv.dilation == conv.padding == (1, 1)
        and conv.padding_mode == "zeros"
        and _is_cellwise(getattr(conv, "norm", None))
    )


def _is_cellwise(norm: object) -> bool:
    if norm is None:
        return True
    # Detectron2's frozen norm has the same buffers and, as torchvision's, no parameters.
    is_batch_norm = isinstance(norm, nn.Module) and hasattr(norm, "running_var")
    return is_batch_norm and not (isinstance(norm, _BATCH_NORMS) and norm.training)


def convolve_windows(windows: Tensor, conv: nn.Module) -> Tensor:
    """Convolve windows without padding: ``[K, C, S, S]`` to ``[K, D, S - 2, S - 2]``.

    Args:
        windows: channels-last, with the cells around what is wanted.
        conv: of which ``takes_windows`` is true.

    Returns:
        Channels-last, in the type of the convolution.
    """
    if isinstance(conv, Int8Conv2d):
        return conv.convolve_windows(windows)
    assert isinstance(conv, nn.Conv2d | WinogradConv2d)
    groups = conv.groups if isinstance(conv, nn.Conv2d) else 1
    convolved = F.conv2d(windows.to(conv.weight.dtype), conv.weight, conv.bias, groups=groups)
    norm = getattr(conv, "norm", None)
    return convolved if norm is None else norm(convolved)
