"""HAT-Net (arXiv 2106.03180): convolutions and hierarchical attention in every stage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from cascade_det.backbones.hierarchical_attention import HierarchicalAttention, whole_map_norm
from cascade_det.backbones.trunk import check_features
from cascade_det.layers.conv_norm import freeze

STAGE_NAMES = ("res2", "res3", "res4", "res5")


@dataclass(frozen=True)
class HATNetShape:
    """Sizes of a HAT-Net; tuples have an entry per stage.

    Attributes:
        channels: multiples of ``head_width``.
        head_width: channels per attention head.
        depths: blocks.
        kernels: odd sides of the depthwise convolutions.
        expansions: hidden channels of the inverted residuals, as multiples of ``channels``.
        grids: sides of the grids of local attention, in tokens; 1 for plain attention.
        poolings: sides of the areas that are pooled for global attention, in tokens.
    """

    channels: tuple[int, int, int, int]
    head_width: int
    depths: tuple[int, int, int, int]
    kernels: tuple[int, int, int, int] = (3, 3, 3, 3)
    expansions: tuple[int, int, int, int] = (8, 8, 4, 4)
    grids: tuple[int, int, int, int] = (8, 7, 7, 1)
    poolings: tuple[int, int, int, int] = (8, 4, 2, 1)


SHAPES = {
    "tiny": HATNetShape((48, 96, 240, 384), 48, (2, 2, 6, 3)),
    "small": HATNetShape((64, 128, 320, 512), 64, (2, 3, 8, 3)),
    "medium": HATNetShape((64, 128, 320, 512), 64, (3, 6, 18, 3), kernels=(5, 3, 5, 3)),
    "large": HATNetShape((64, 128, 320, 640), 64, (3, 8, 27, 3)),
}


class HATNet(nn.Module):
    """A HAT-Net trunk: the ends of its stages, of strides 4 to 32.

    Its maps are sums of residuals and are not normalised. State-dict names are the official ones
    without the classifier and without ``proj_norm``, which official checkpoints have but the
    network never uses.

    Norms look at the whole map, so zeros that pad an image to the size of a batch change its maps.
    With random weights the mean difference is 6 to 13% of the mean size of the values for a tenth
    more on each side, and 22 to 45% for a half.

    Args:
        name: a key of ``SHAPES``.
        shape: sizes of another network, in place of a named one.
        out_features: names from ``res2`` to ``res5``; stages after the last are not built.
        freeze_at: 0 trains all; 1 freezes the stem, 2 also the first stage, and so on.
        drop_path: in training, the share of images for which the residuals of the last block are
            dropped (stochastic depth, arXiv 1603.09382); it rises linearly from 0 over all blocks.

    Attributes:
        channels: output channels by feature name.

    Raises:
        ValueError: for an unknown name or feature.
    """

    def __init__(
        self,
        *,
        name: str = "tiny",
        shape: HATNetShape | None = None,
        out_features: tuple[str, ...] = STAGE_NAMES,
        freeze_at: int = 0,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        if shape is None:
            if name not in SHAPES:
                raise ValueError(f"unknown HAT-Net {name!r}; known: {', '.join(SHAPES)}")
            shape = SHAPES[name]
        self.out_features = check_features(out_features, STAGE_NAMES)
        indices = [STAGE_NAMES.index(feature) for feature in self.out_features]
        self.channels = {STAGE_NAMES[i]: shape.channels[i] for i in indices}
        self.patch_embed = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            whole_map_norm(16),
            SiLU(),
            nn.Conv2d(16, shape.channels[0], 3, stride=2, padding=1),
        )
        num_blocks = sum(shape.depths)
        rates = (drop_path * i / max(num_blocks - 1, 1) for i in range(num_blocks))
        self.blocks = nn.ModuleList()
        for i in range(1 + max(indices)):
            if i > 0:
                self.add_module(f"ds{i + 1}", Downsample(*shape.channels[i - 1 : i + 1]))
            blocks = [
                Block(
                    HierarchicalAttention(
                        shape.channels[i],
                        head_width=shape.head_width,
                        grid=shape.grids[i],
                        pooling=shape.poolings[i],
                    ),
                    InvertedResidual(
                        shape.channels[i],
                        shape.expansions[i] * shape.channels[i],
                        kernel=shape.kernels[i],
                    ),
                    drop_path=next(rates),
                )
                for _ in range(shape.depths[i])
            ]
            self.blocks.append(nn.Sequential(*blocks))
        self.apply(_initialise)
        for part in [self.patch_embed, *map(nn.ModuleList, self._stages())][:freeze_at]:
            freeze(part)

    def stem_and_stages(self) -> tuple[nn.Module, list[nn.Module]]:
        """The patch embedding; blocks and downsampling in turn."""
        return self.patch_embed, [module for stage in self._stages() for module in stage]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images ``[N, 3, H, W]`` to the maps of ``out_features`` by name."""
        x = self.patch_embed(images)
        maps = {}
        for name, stage in zip(STAGE_NAMES, self._stages(), strict=False):
            for module in stage:
                x = module(x)
            if name in self.out_features:
                maps[name] = x
        return maps

    def _stages(self) -> list[list[nn.Module]]:
        first, *others = self.blocks
        return [[first]] + [
            [self.get_submodule(f"ds{i}"), blocks] for i, blocks in enumerate(others, start=2)
        ]


class Downsample(nn.Module):
    """To half of the size, for the next stage."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.norm = whole_map_norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, out_channels, H / 2, W / 2]``, rounded up."""
        return self.norm(self.conv(x))


class Block(nn.Module):
    """Attention and convolutions, each with a shortcut and stochastic depth."""

    def __init__(self, attention: nn.Module, convolutions: nn.Module, *, drop_path: float) -> None:
        super().__init__()
        self.attn, self.conv = attention, convolutions
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape."""
        x = x + self.drop_path(self.attn(x))
        return self.drop_path(self.conv(x)).add_(x)


class SiLU(nn.Module):
    """``x * sigmoid(x)``; in place where no gradient needs x."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return F.silu(x, inplace=not torch.is_grad_enabled())


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and projection, between two norms; without its shortcut."""

    def __init__(self, channels: int, hidden: int, *, kernel: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            whole_map_norm(channels), nn.Conv2d(channels, hidden, 1, bias=False), SiLU()
        )
        self.conv2 = nn.Sequential(
            nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden, bias=False),
            SiLU(),
        )
        self.conv3 = nn.Sequential(
            nn.Conv2d(hidden, channels, 1, bias=False), whole_map_norm(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape."""
        return self.conv3(self.conv2(self.conv1(x)))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
