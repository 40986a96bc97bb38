"""ResNet (arXiv 1512.03385) with Detectron2's names, strides, freezing and initialisation.

torchvision's ResNet cannot put the stride into the first 1x1 convolution, as the ImageNet weights
of most published Cascade R-CNN models need, and has other names for all layers.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from cascade_det.backbones.trunk import check_features
from cascade_det.layers.conv_norm import ConvNorm, add_convolved, convolved_relu, freeze

BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
STAGE_NAMES = ("res2", "res3", "res4", "res5")


class ResNet(nn.Module):
    """A ResNet trunk whose stages are named ``res2`` to ``res5``, of strides 4 to 32.

    Args:
        depth: 18, 34, 50, 101 or 152.
        out_features: names of the stages to return; stages after the last are not built.
        norm: see ``cascade_det.layers.make_norm``.
        stride_in_1x1: whether the stride of a bottleneck block is in its first 1x1 convolution
            (the original MSRA weights) or in its 3x3 (torchvision's).
        num_groups: groups of the 3x3 convolutions (ResNeXt).
        width_per_group: channels of each group in ``res2``.
        freeze_at: 0 trains all; 1 freezes the stem, 2 also ``res2``, and so on.

    Attributes:
        channels: output channels by stage name.

    Raises:
        ValueError: for an unknown depth or stage name.
    """

    def __init__(
        self,
        *,
        depth: int,
        out_features: tuple[str, ...] = STAGE_NAMES,
        norm: str = "FrozenBN",
        stride_in_1x1: bool = True,
        num_groups: int = 1,
        width_per_group: int = 64,
        freeze_at: int = 2,
    ) -> None:
        super().__init__()
        if depth not in BLOCKS_PER_STAGE:
            raise ValueError(f"no ResNet of depth {depth}; known: {list(BLOCKS_PER_STAGE)}")
        self.out_features = check_features(out_features, STAGE_NAMES)
        self.channels: dict[str, int] = {}
        self.stem = Stem(norm=norm)
        in_channels, width = 64, num_groups * width_per_group
        num_stages = 1 + max(STAGE_NAMES.index(name) for name in out_features)
        self.stage_names = STAGE_NAMES[:num_stages]
        for i, name in enumerate(self.stage_names):
            blocks = []
            for j in range(BLOCKS_PER_STAGE[depth][i]):
                stride = 2 if i > 0 and j == 0 else 1
                block: nn.Module
                if depth < 50:
                    out_channels = 64 * 2**i
                    block = BasicBlock(in_channels, out_channels, stride=stride, norm=norm)
                else:
                    out_channels = 256 * 2**i
                    block = BottleneckBlock(
                        in_channels,
                        out_channels,
                        bottleneck_channels=width * 2**i,
                        stride=stride,
                        num_groups=num_groups,
                        stride_in_1x1=stride_in_1x1,
                        norm=norm,
                    )
                blocks.append(block)
                in_channels = out_channels
            self.add_module(name, nn.Sequential(*blocks))
            self.channels[name] = in_channels
        self._initialise()
        parts = [self.stem, *(self.get_submodule(name) for name in self.stage_names)]
        for part in parts[:freeze_at]:
            freeze(part)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images ``[N, 3, H, W]`` to the maps of ``out_features`` by name."""
        x = self.stem(images)
        maps = {}
        for name in self.stage_names:
            x = self.get_submodule(name)(x)
            if name in self.out_features:
                maps[name] = x
        return maps

    def stem_and_stages(self) -> tuple[nn.Module, list[nn.Module]]:
        """The stem, and ``res2`` to the last stage."""
        return self.stem, [self.get_submodule(name) for name in self.stage_names]

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class Stem(nn.Module):
    """7x7 convolution and max pooling, to a quarter of the size."""

    def __init__(self, *, norm: str) -> None:
        super().__init__()
        self.conv1 = ConvNorm(3, 64, 7, stride=2, norm=norm)

    def forward(self, images: Tensor) -> Tensor:
        """``[N, 3, H, W]`` to ``[N, 64, H / 4, W / 4]``."""
        x = F.relu_(self.conv1(images))  # [N, 64, H / 2, W / 2]
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: the block of ResNet-18 and 34."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, norm: str) -> None:
        super().__init__()
        self.shortcut = _shortcut(in_channels, out_channels, stride, norm)
        self.conv1 = ConvNorm(in_channels, out_channels, 3, stride=stride, norm=norm)
        self.conv2 = ConvNorm(out_channels, out_channels, 3, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, out_channels, H / stride, W / stride]``."""
        out = self.conv2(convolved_relu(x, self.conv1))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut: the block of ResNet-50 and deeper.

    Without gradients it may overwrite an input of the size of its output.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int,
        num_groups: int,
        stride_in_1x1: bool,
        norm: str,
    ) -> None:
        super().__init__()
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.shortcut = _shortcut(in_channels, out_channels, stride, norm)
        self.conv1 = ConvNorm(in_channels, bottleneck_channels, 1, stride=stride_1x1, norm=norm)
        self.conv2 = ConvNorm(
            bottleneck_channels,
            bottleneck_channels,
            3,
            stride=stride_3x3,
            groups=num_groups,
            norm=norm,
        )
        self.conv3 = ConvNorm(bottleneck_channels, out_channels, 1, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, out_channels, H / stride, W / stride]``."""
        out = convolved_relu(x, self.conv1)
        out = convolved_relu(out, self.conv2)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return add_convolved(shortcut, out, self.conv3)


RESIDUAL_BLOCKS = (BasicBlock, BottleneckBlock)


def _shortcut(in_channels: int, out_channels: int, stride: int, norm: str) -> ConvNorm | None:
    if in_channels == out_channels:
        return None
    return ConvNorm(in_channels, out_channels, 1, stride=stride, norm=norm)
