"""Feature pyramid network, arXiv 1612.03144, with Detectron2's names."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascade_det.backbones.trunk import LEVELS, Trunk
from cascade_det.layers.conv_norm import ConvNorm, may_write_in_place
from cascade_det.layers.tiles import FeatureMap, TiledMap, as_tensor, convolve_to
from cascade_det.layers.windows import takes_windows


class FPN(nn.Module):
    """Top-down pathway over a trunk, and coarser levels, by subsampling or convolutions.

    Outputs are called after their strides: a trunk of ``res2`` to ``res5`` has ``p2`` to ``p6``, of
    strides 4 to 64.

    Args:
        bottom_up: the trunk, with ``out_features`` and ``channels``.
        out_channels: C of every level.
        norm: of the convolutions, see ``cascade_det.layers.make_norm``.
        fuse_type: ``sum`` or ``avg`` of the lateral and the top-down map.
        extra_convs: number of coarser levels made by ``StridedLevels`` of the trunk's coarsest map;
            0 for one level, every second pixel of the coarsest.

    Attributes:
        levels: base-2 logarithms of the strides of the trunk's maps, finest first.
        strides: stride in pixels by output name, finest first.

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
        extra_convs: int = 0,
    ) -> None:
        super().__init__()
        self.in_features = tuple(bottom_up.out_features)
        self.levels = levels = neighbouring_levels(self.in_features)
        self.out_channels = out_channels
        self.scale = {"sum": 1.0, "avg": 0.5}[fuse_type]
        for name, level in zip(self.in_features, levels, strict=True):
            channels = bottom_up.channels[name]
            lateral = ConvNorm(channels, out_channels, 1, norm=norm)
            output = ConvNorm(out_channels, out_channels, 3, norm=norm)
            for kind, conv in (("lateral", lateral), ("output", output)):
                initialise(conv)
                self.add_module(f"fpn_{kind}{level}", conv)
        self.top_block = (
            StridedLevels(bottom_up, out_channels=out_channels, num_levels=extra_convs)
            if extra_convs
            else None
        )
        top = levels[-1] + max(extra_convs, 1)
        self.strides = {f"p{level}": 2**level for level in range(levels[0], top + 1)}
        self.bottom_up = bottom_up

    @property
    def size_divisibility(self) -> int:
        """Image sides must be multiples of it."""
        return 1 << self.levels[-1]

    def freeze_unread(self, names: Collection[str]) -> None:
        """Freeze the convolutions of maps that are not read.

        They get no gradients, but distributed training waits for the gradients of every parameter
        that is not frozen.

        Args:
            names: of the maps that are read.
        """
        top, block = self.levels[-1], self.top_block
        read = [level for level in self.levels if f"p{level}" in names]
        if block is not None:
            block.freeze_unread(names)
        elif f"p{top + 1}" in names and top not in read:
            read.append(top)  # of which that map is made
        for level in set(self.levels) - set(read):
            self.get_submodule(f"fpn_output{level}").requires_grad_(False)
            # A lateral convolution feeds its own level and all finer ones.
            if level < min(read, default=top + 1):
                self.get_submodule(f"fpn_lateral{level}").requires_grad_(False)

    def laterals_and_outputs(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """The layers that take maps of the trunk, and all others."""
        laterals, outputs = (
            [self.get_submodule(f"fpn_{kind}{level}") for level in self.levels]
            for kind in ("lateral", "output")
        )
        if self.top_block is not None:
            first, *others = self.top_block.children()
            return [*laterals, first], [*outputs, *others]
        return laterals, outputs

    @property
    def takes_tiles(self) -> bool:
        """Whether the finest map can be computed in tiles."""
        return takes_windows(self.get_submodule(f"fpn_output{self.levels[0]}"))

    def forward(self, images: Tensor, *, in_tiles: bool = False) -> dict[str, FeatureMap]:
        """Images ``[N, 3, H, W]``, sides multiples of ``size_divisibility``, to maps by name.

        Args:
            images: a batch.
            in_tiles: leave the finest map to be computed where it is read, as a ``TiledMap``, if
                that suits its convolution and its sides, see ``TiledMap.suits``.
        """
        maps = self.bottom_up(images)
        extra = [] if self.top_block is None else self.top_block(maps[self.in_features[-1]])
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
        pyramid: dict[str, FeatureMap] = {}
        for level in reversed(self.levels):
            name = f"p{level}"
            output, x = self.get_submodule(f"fpn_output{level}"), merged.pop(name)
            if in_tiles and level == self.levels[0] and TiledMap.suits(x, output):
                pyramid[name] = _in_tiles(output, x, buffers.get(name))
            else:
                pyramid[name] = convolve_to(output, x, buffers.get(name))
        top = f"p{self.levels[-1]}"
        if not extra:
            coarsest = as_tensor(pyramid[top])
            extra = [F.max_pool2d(coarsest, kernel_size=1, stride=2)]  # half the size
        levels = [*reversed(pyramid.values()), *extra]
        return dict(zip(self.strides, levels, strict=True))


class StridedLevels(nn.Module):
    """Coarser levels by 3x3 convolutions of stride 2, the first on the trunk's coarsest map.

    The rule of RetinaNet (arXiv 1708.02002, section 4), without the ReLU between. It is a top block
    of Detectron2's FPN too.

    Args:
        bottom_up: the trunk.
        out_channels: C of every level.
        num_levels: how many.

    Attributes:
        in_feature: name of the trunk's map.
    """

    def __init__(self, bottom_up: Trunk, *, out_channels: int, num_levels: int) -> None:
        super().__init__()
        self.in_feature = bottom_up.out_features[-1]
        self.num_levels = num_levels
        channels, level = bottom_up.channels[self.in_feature], LEVELS[self.in_feature]
        for i in range(level + 1, level + 1 + num_levels):
            conv = ConvNorm(channels, out_channels, 3, stride=2)
            initialise(conv)
            self.add_module(f"p{i}", conv)
            channels = out_channels

    def freeze_unread(self, names: Collection[str]) -> None:
        """Freeze the convolutions after the last map that is read, of ``names``."""
        for name, conv in reversed(list(self.named_children())):
            if name in names:
                return
            conv.requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """``[N, C, H, W]`` to one map per level, each half the size of the one before."""
        maps = []
        for conv in self.children():
            x = conv(x)
            maps.append(x)
        return maps


def neighbouring_levels(in_features: Sequence[str]) -> list[int]:
    """Base-2 logarithms of the strides of a trunk's maps.

    Raises:
        ValueError: they are not contiguous, finest first.
    """
    levels = [LEVELS[name] for name in in_features]
    if levels != list(range(levels[0], levels[0] + len(levels))):
        raise ValueError(f"a pyramid needs neighbouring levels, finest first: {in_features}")
    return levels


def initialise(conv: ConvNorm) -> None:
    """Uniform weights of variance 1 / number of inputs, and zero bias."""
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


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


def _in_tiles(conv: nn.Module, x: Tensor, out: Tensor | None) -> TiledMap:
    if out is None:
        out = torch.empty_like(x, memory_format=torch.channels_last)
    return TiledMap(x, conv, out)
