"""The decoder's upsampling for inference, at 4/9 of its multiply-adds."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascade_det.backbones.decoder_blocks import UpConv


class FastUpConv(UpConv):
    """``UpConv`` for inference: the same up to rounding where it doubles the size.

    Where it does not, it is ``UpConv`` itself.

    Args:
        up: its convolution and norm are shared, under the same state-dict names; kernels are
            computed from the weight now, so fold norms and load weights before.
    """

    def __init__(self, up: UpConv) -> None:
        nn.Module.__init__(self)
        self.up = up.up
        weight = up.up.get_parameter("1.weight").detach()
        layout = torch.channels_last if _is_channels_last(weight) else torch.contiguous_format
        self.kernels: Tensor
        kernels = torch.cat(doubling_kernels(weight)).contiguous(memory_format=layout)
        self.register_buffer("kernels", kernels, persistent=False)  # [4 K, D, 2, 2]
        self.train(up.training)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """``[N, D, H, W]`` to ``[N, K, *size]``; by default twice the size."""
        height, width = x.shape[2:]
        if size is not None and tuple(size) != (2 * height, 2 * width):
            return super().forward(x, size)
        conv, norm = self.up
        assert isinstance(conv, nn.Conv2d)
        layout = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
        shape = len(x), conv.out_channels, 2 * height, 2 * width
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        for i, kernel in enumerate(self.kernels.chunk(4)):
            row, column = divmod(i, 2)
            # [H + 1, W + 1]: from above the first pixel to below the last.
            part = F.conv2d(x, kernel, conv.bias, padding=1)
            y[:, :, row::2, column::2] = part[..., row : row + height, column : column + width]
        return F.relu_(norm(y))


def use_fast_upconv(module: nn.Module) -> int:
    """Replace every ``UpConv`` in evaluation mode inside ``module``, in place.

    Not those whose convolution was replaced, by Winograd's algorithm.

    Returns:
        The number of replaced ones; ``module`` itself is not replaced.
    """
    count = 0
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is UpConv and not child.training and _is_direct(child):
                setattr(parent, name, FastUpConv(child))
                count += 1
    return count


def _is_direct(up: UpConv) -> bool:
    return type(up.up[0]) is nn.Conv2d


def doubling_kernels(weight: Tensor) -> list[Tensor]:
    """What a 3x3 kernel is after doubling by nearest neighbours.

    The neighbours of an even row y lie in two rows before doubling, y/2 - 1 and y/2; those of an
    odd one in (y - 1)/2 and (y + 1)/2. Columns are the same. Weights of one pixel are added.

    Args:
        weight: ``[K, D, 3, 3]``.

    Returns:
        Four kernels ``[K, D, 2, 2]``, one for each ``(y % 2, x % 2)`` of the result.
    """
    kernels = []
    for first, last in _pairs(weight, 2):
        rows = torch.stack([first, last], 2)
        kernels += [torch.stack(columns, 3) for columns in _pairs(rows, 3)]
    return kernels


def _pairs(weight: Tensor, dim: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    first, middle, last = weight.unbind(dim)
    return (first, middle + last), (first + middle, last)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)
