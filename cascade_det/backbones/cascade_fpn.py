"""The CASCADE decoder as the pyramid of a detector."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn
from torch.nn import functional as F

from cascade_det.backbones.cascade_decoder import CascadeDecoder
from cascade_det.backbones.fpn import StridedLevels, initialise, neighbouring_levels
from cascade_det.backbones.trunk import Trunk
from cascade_det.layers.conv_norm import ConvNorm

_BLOCKS = ("Up", "AG", "CA", "ConvBlock")  # of a level of the decoder


class CascadeFPN(nn.Module):
    """1x1 convolutions of a trunk's maps to one width, and the CASCADE decoder over them.

    In place of FPN's addition and its output convolutions: attention gates, channel and spatial
    attention and convolutions with batch norm (``CascadeDecoder``). Channel attention looks at the
    whole map. Outputs have the names and strides of ``FPN``.

    Args:
        bottom_up: the trunk, with ``out_features`` and ``channels``, of two levels or more.
        out_channels: C of every level, 16 or more.
        extra_convs: as of ``FPN``.

    Attributes:
        levels: base-2 logarithms of the strides of the trunk's maps, finest first.
        strides: stride in pixels by output name, finest first.

    Raises:
        ValueError: the trunk's features are not of contiguous strides, or are fewer than two, or
            ``out_channels`` is below 16.
    """

    def __init__(self, bottom_up: Trunk, *, out_channels: int = 256, extra_convs: int = 0) -> None:
        super().__init__()
        self.in_features = tuple(bottom_up.out_features)
        self.levels = neighbouring_levels(self.in_features)
        self.out_channels = out_channels
        for name, level in zip(self.in_features, self.levels, strict=True):
            lateral = ConvNorm(bottom_up.channels[name], out_channels, 1)
            initialise(lateral)
            self.add_module(f"fpn_lateral{level}", lateral)
        self.decoder = CascadeDecoder([out_channels] * len(self.levels))
        self.top_block = (
            StridedLevels(bottom_up, out_channels=out_channels, num_levels=extra_convs)
            if extra_convs
            else None
        )
        top = self.levels[-1] + max(extra_convs, 1)
        self.strides = {f"p{level}": 2**level for level in range(self.levels[0], top + 1)}
        self.bottom_up = bottom_up

    @property
    def size_divisibility(self) -> int:
        """Image sides must be multiples of it."""
        return 1 << self.levels[-1]

    def freeze_unread(self, names: Collection[str]) -> None:
        """Freeze the layers that only maps which are not read depend on.

        They get no gradients, but distributed training waits for the gradients of every parameter
        that is not frozen.

        Args:
            names: of the maps that are read.
        """
        top = self.levels[-1]
        read = [level for level in self.levels if f"p{level}" in names]
        if self.top_block is not None:
            self.top_block.freeze_unread(names)
        elif f"p{top + 1}" in names:
            read.append(top)  # of which that map is made
        # A level feeds all finer ones.
        finest, unread = self.levels[0], range(self.levels[0], min(read, default=top + 1))
        layers = [f"fpn_lateral{level}" for level in unread]
        if read:
            numbers = [level - finest + 1 for level in unread]
            layers += [f"decoder.{block}{number}" for number in numbers for block in _BLOCKS]
        else:
            layers.append("decoder")
        for name in layers:
            self.get_submodule(name).requires_grad_(False)

    def laterals_and_outputs(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """The layers that take maps of the trunk, and all others."""
        laterals = [self.get_submodule(f"fpn_lateral{level}") for level in self.levels]
        if self.top_block is not None:
            first, *others = self.top_block.children()
            return [*laterals, first], [self.decoder, *others]
        return laterals, [self.decoder]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images ``[N, 3, H, W]``, sides multiples of ``size_divisibility``, to maps by name."""
        maps = self.bottom_up(images)
        extra = [] if self.top_block is None else self.top_block(maps[self.in_features[-1]])
        laterals = [
            # pop: frees the memory of each map after its use.
            self.get_submodule(f"fpn_lateral{level}")(maps.pop(name))
            for name, level in zip(reversed(self.in_features), reversed(self.levels), strict=True)
        ]
        decoded = self.decoder(laterals)  # coarsest first
        extra = extra or [F.max_pool2d(decoded[0], kernel_size=1, stride=2)]  # half the size
        return dict(zip(self.strides, [*reversed(decoded), *extra], strict=True))
