"""3x3 convolutions for inference on CPUs by Winograd's F(4x4, 3x3)."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascade_det.layers.conv_norm import ConvNorm
from cascade_det.layers.products import mkl_lacks_avx512
from cascade_det.layers.winograd_kernel import transform_weight, winograd_conv2d

# With more, transformed weights take tens of megabytes each, for small maps.
MAX_CHANNELS = 256
MIN_TILES = 24  # per thread


def min_channels() -> int:
    """With fewer, the transforms cost what the products save; measured."""
    return 192 if mkl_lacks_avx512() else 128


class WinogradConv2d(nn.Module):
    """A 3x3 convolution of stride 1 and padding 1 for inference, with unchanged state-dict names.

    Falls back to the direct convolution where it is faster (few tiles) and where Winograd's does
    not apply: dtypes other than float32, devices other than CPUs, autocast, gradients, empty
    batches.

    Args:
        conv: the convolution to replace; parameters and norm are shared. The transformed weight
            takes four times the memory of the weight. It is renewed by ``load_state_dict``, but
            by no other change of the weight.

    Raises:
        ValueError: for a convolution that is not 3x3 with stride, dilation, groups and padding 1.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        if not _is_plain_3x3(conv):
            raise ValueError(f"not 3x3 with stride, dilation, groups and padding 1: {conv}")
        self.weight = conv.weight
        self.bias = conv.bias
        self.norm = conv.norm if isinstance(conv, ConvNorm) else None
        self.transformed: Tensor
        self.register_buffer("transformed", transform_weight(conv.weight), persistent=False)
        self.train(conv.training)
        self.register_load_state_dict_post_hook(_transform_again)

    def forward(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """``[N, C, H, W]`` to ``[N, K, H, W]``, channels-last; written to ``out`` if given."""
        if self._is_faster(x):
            x = winograd_conv2d(x, self.transformed, self.bias, out=out)
        else:
            x = x.contiguous(memory_format=torch.channels_last)
            x = F.conv2d(x, self.weight, self.bias, padding=1)
        if self.norm is not None:
            x = self.norm(x)
        return x if out is None or x is out else out.copy_(x)

    def applies_to(self, x: Tensor) -> bool:
        """Whether Winograd's algorithm can convolve ``x``."""
        if x.device.type != "cpu" or {x.dtype, self.transformed.dtype} != {torch.float32}:
            return False
        if torch.is_autocast_enabled("cpu"):
            return False
        return not (torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad))

    def _is_faster(self, x: Tensor) -> bool:
        tiles = x.shape[0] * ceil(x.shape[2] / 4) * ceil(x.shape[3] / 4)
        return self.applies_to(x) and tiles >= MIN_TILES * torch.get_num_threads()


def _transform_again(module: WinogradConv2d, incompatible_keys: object) -> None:
    module.transformed.copy_(transform_weight(module.weight))


def use_winograd(module: nn.Module) -> int:
    """Replace the 3x3 convolutions inside ``module`` that get faster, in place.

    These are ``Conv2d`` and ``ConvNorm`` in evaluation mode, with float32 weights on the CPU,
    stride, dilation, groups and padding 1, and ``min_channels()`` to ``MAX_CHANNELS`` channels in
    and out. A convolution with several names is replaced by one module.

    Returns:
        The number of replaced convolutions; ``module`` itself is not replaced.
    """
    replaced: dict[nn.Module, WinogradConv2d] = {}
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if not isinstance(child, nn.Conv2d) or not _is_replaceable(child):
                continue
            if child not in replaced:
                replaced[child] = WinogradConv2d(child)
            setattr(parent, name, replaced[child])
    return len(replaced)


def _is_replaceable(conv: nn.Conv2d) -> bool:
    return (
        type(conv) in (nn.Conv2d, ConvNorm)
        and _is_plain_3x3(conv)
        and not conv.training
        and conv.weight.dtype == torch.float32
        and conv.weight.device.type == "cpu"
        and min(conv.in_channels, conv.out_channels) >= min_channels()
        and max(conv.in_channels, conv.out_channels) <= MAX_CHANNELS
    )


def _is_plain_3x3(conv: nn.Conv2d) -> bool:
    return (
        conv.kernel_size == (3, 3)
        and conv.stride == conv.dilation == conv.padding == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )
