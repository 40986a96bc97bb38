"""Feature pyramid network, arXiv 1612.03144, with Detectron2's names."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascade_det.backbones.trunk import LEVELS, Trunk
from cascade_det.layers.conv_norm import ConvNorm, may_write_in_place
from cascade_det.layers.winograd import WinogradConv2d


class FPN(nn.Module):
    """Top-down pathway over a trunk, and one coarser level by subsampling.

    Outputs are ``p2`` to ``p6``, of strides 4 to 64, as far as the trunk has features.

    Args:
        bottom_up: the trunk, with ``out_features`` and ``channels``.
        out_channels: C of every level.
        norm: of the convolutions, see ``cascade_det.layers.make_norm``.
        fuse_type: ``sum`` or ``avg`` of the lateral and the top-down map.

    Attributes:
        strides: stride in pixels by output name, finest first.
        size_divisibility: image sides must be multiples of it.

    Raises:
        ValueError: if the trunk's features are not of contiguous strides.
    """

    def __init__(
        self,
        bottom_up: Trunk,
        *,
        out_channels: int = 256,
        norm: str = "",
        fuse_type: str = "sum",
    ) -> None:
        super().__init__()
        self.in_features = tuple(bottom_up.out_features)
        levels = [LEVELS[name] for name in self.in_features]
        if levels != list(range(levels[0], levels[0] + len(levels))):
            raise ValueError(f"FPN needs neighbouring levels, finest first: {self.in_features}")
        self.levels = levels
        self.out_channels = out_channels
        self.scale = {"sum": 1.0, "avg": 0.5}[fuse_type]
        for name, level in zip(self.in_features, levels, strict=True):
            channels = bottom_up.channels[name]
            lateral = ConvNorm(channels, out_channels, 1, norm=norm)
            output = ConvNorm(out_channels, out_channels, 3, norm=norm)
            for kind, conv in (("lateral", lateral), ("output", output)):
                _initialise(conv)
                self.add_module(f"fpn_{kind}{level}", conv)
        self.strides = {f"p{level}": 2**level for level in [*levels, levels[-1] + 1]}
        self.size_divisibility = 2 ** levels[-1]
        self.bottom_up = bottom_up

    def freeze_unread(self, names: Collection[str]) -> None:
        """Freeze the convolutions of maps that are not read.

        They get no gradients, but distributed training waits for the gradients of every parameter
        that is not frozen.

        Args:
            names: of the maps that are read.
        """
        # The coarsest map is made of the one before.
        top = self.levels[-1]
        read = [i for i in self.levels if f"p{i}" in names or (i == top and f"p{i + 1}" in names)]
        for level in set(self.levels) - set(read):
            self.get_submodule(f"fpn_output{level}").requires_grad_(False)
            # A lateral convolution feeds its own level and all finer ones.
            if level < min(read):
                self.get_submodule(f"fpn_lateral{level}").requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images ``[N, 3, H, W]``, sides multiples of ``size_divisibility``, to maps by name."""
        maps = self.bottom_up(images)
        merged: dict[str, Tensor] = {}
        coarser: Tensor | None = None
        for name, level in zip(reversed(self.in_features), reversed(self.levels), strict=True):
            # pop: frees the memory of each map after its use.
            lateral = self.get_submodule(f"fpn_lateral{level}")(maps.pop(name))  # [N, C, H_l, W_l]
            if coarser is not None:
                lateral = _add_at_twice_the_size(lateral, coarser)
                if self.scale != 1.0:
                    lateral = lateral.mul_(self.scale)
            merged[f"p{level}"] = coarser = lateral
        del lateral, coarser
        buffers = _output_buffers(merged)
        pyramid: dict[str, Tensor] = {}
        for level in reversed(self.levels):
            name = f"p{level}"
            output = self.get_submodule(f"fpn_output{level}")
            pyramid[name] = _apply(output, merged.pop(name), buffers.get(name))
        top = f"p{self.levels[-1]}"
        coarsest = F.max_pool2d(pyramid[top], kernel_size=1, stride=2)  # half the size
        return {name: pyramid.get(name, coarsest) for name in self.strides}


def _add_at_twice_the_size(lateral: Tensor, coarser: Tensor) -> Tensor:
    """``[N, C, 2 H, 2 W]`` plus nearest neighbours in ``[N, C, H, W]``, in place."""
    if not may_write_in_place(lateral):
        return lateral.add_(F.interpolate(coarser, scale_factor=2.0, mode="nearest"))
    # Without a copy of the enlarged map.
    quads = lateral.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [N, C, H, 2, W, 2]
    quads.add_(coarser[:, :, :, None, :, None])
    return lateral


def _output_buffers(maps: dict[str, Tensor]) -> dict[str, Tensor]:
    """Channels-last buffers of the sizes of ``maps``, finest first in one block of memory.

    RoI pooling on CPUs reads this layout without a copy. ``maps`` are coarsest first. Empty where
    maps cannot be written in place.
    """
    finest_first = dict(reversed(maps.items()))
    finest = next(iter(finest_first.values()))
    if (
        finest.device.type != "cpu"
        or torch.is_autocast_enabled("cpu")  # norms change the dtype
        or not all(map(may_write_in_place, maps.values()))
    ):
        return {}
    sizes = [map_.numel() for map_ in finest_first.values()]
    block = finest.new_empty(sum(sizes))
    buffers = {}
    for (name, map_), part in zip(finest_first.items(), block.split(sizes), strict=True):
        images, channels, height, width = map_.shape
        buffers[name] = part.view(images, height, width, channels).permute(0, 3, 1, 2)
    return buffers


def _apply(conv: nn.Module, x: Tensor, out: Tensor | None) -> Tensor:
    if out is not None and isinstance(conv, WinogradConv2d):
        return conv(x, out=out)
    output: Tensor = conv(x)
    return output if out is None else out.copy_(output)


def _initialise(conv: ConvNorm) -> None:
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
