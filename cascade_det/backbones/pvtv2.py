"""PVTv2 (arXiv 2106.13797): attention whose keys are reduced by convolutions, from timm."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from cascade_det.backbones.timm_extra import without_timm
from cascade_det.backbones.trunk import LEVELS, check_features
from cascade_det.layers.conv_norm import freeze

STAGE_NAMES = ("res2", "res3", "res4", "res5")
# Of a stage, in order of use.
PARTS = ("patch_embed", "block", "norm")


@dataclass(frozen=True)
class PVTv2Shape:
    """Sizes of a PVTv2; tuples have an entry per stage.

    Attributes:
        channels: of the stages.
        depths: blocks.
        heads: of the attention.
        expansions: hidden channels of the MLPs, as multiples of ``channels``.
        reductions: sides of the areas that become one key, in tokens.
    """

    channels: tuple[int, ...] = (64, 128, 320, 512)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    heads: tuple[int, ...] = (1, 2, 5, 8)
    expansions: tuple[int, ...] = (8, 8, 4, 4)
    reductions: tuple[int, ...] = (8, 4, 2, 1)


# Table 1 of the paper.
SHAPES = {
    "b0": PVTv2Shape((32, 64, 160, 256), (2, 2, 2, 2)),
    "b1": PVTv2Shape(depths=(2, 2, 2, 2)),
    "b2": PVTv2Shape(),
    "b3": PVTv2Shape(depths=(3, 4, 18, 3)),
    "b4": PVTv2Shape(depths=(3, 8, 27, 3)),
    "b5": PVTv2Shape(depths=(3, 6, 40, 3), expansions=(4, 4, 4, 4)),
}


class PVTv2(nn.Module):
    """A PVTv2 trunk: the normalised ends of its stages, of strides 4 to 32.

    Its layers are timm's; state-dict names are the official ones, without the classifier
    (``block1.0.attn.q.weight``). Images below 32 pixels, which have fewer tokens than become one
    key, are padded with zeros on the right and below.

    Args:
        name: a key of ``SHAPES``.
        shape: sizes of another network, in place of a named one.
        out_features: names from ``res2`` to ``res5``; stages after the last are not built.
        freeze_at: 0 trains all; 1 freezes the first patch embedding, 2 also the first stage, and
            so on.
        drop_path: in training, the share of images for which the residuals of the last block are
            dropped (stochastic depth, arXiv 1603.09382); it rises linearly from 0 over all blocks.

    Attributes:
        channels: output channels by feature name.

    Raises:
        ConfigError: timm cannot be imported.
        ValueError: for an unknown name or feature.
    """

    def __init__(
        self,
        *,
        name: str = "b2",
        shape: PVTv2Shape | None = None,
        out_features: tuple[str, ...] = STAGE_NAMES,
        freeze_at: int = 0,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        if shape is None:
            if name not in SHAPES:
                raise ValueError(f"unknown PVTv2 {name!r}; known: {', '.join(SHAPES)}")
            shape = SHAPES[name]
        self.out_features = check_features(out_features, STAGE_NAMES)
        indices = [STAGE_NAMES.index(feature) for feature in self.out_features]
        self.channels = {STAGE_NAMES[i]: shape.channels[i] for i in indices}
        self.num_stages = 1 + max(indices)
        # In pixels; an area of a stage has this side.
        self.smallest = max(
            side * 2 ** LEVELS[stage]
            for side, stage in zip(shape.reductions, STAGE_NAMES, strict=True)
        )
        for i, modules in enumerate(_stages(shape, drop_path)[: self.num_stages], start=1):
            for part, module in zip(PARTS, modules, strict=True):
                self.add_module(f"{part}{i}", module)
        (stem, *first), *others = self._stages()
        for frozen in [[stem], first, *others][:freeze_at]:
            freeze(nn.ModuleList(frozen))

    def stem_and_stages(self) -> tuple[nn.Module, list[nn.Module]]:
        """The first patch embedding; blocks, norms and the other embeddings in turn."""
        stem, *others = (module for stage in self._stages() for module in stage)
        return stem, others

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images ``[N, 3, H, W]`` to the maps of ``out_features`` by name, channels-last."""
        height, width = images.shape[-2:]
        if min(height, width) >= self.smallest:
            return self._maps(images)
        right, below = (max(0, self.smallest - side) for side in (width, height))
        maps = self._maps(F.pad(images, (0, right, 0, below)))
        return {
            name: x[..., : _divided(height, name), : _divided(width, name)]
            for name, x in maps.items()
        }

    def _maps(self, images: Tensor) -> dict[str, Tensor]:
        maps, x = {}, images
        for name, (embedding, blocks, norm) in zip(STAGE_NAMES, self._stages(), strict=False):
            x = embedding(x)  # [N, H, W, C]
            tokens = x.flatten(1, 2)
            for block in blocks.children():
                tokens = block(tokens, x.shape[1:3])
            x = norm(tokens).view(x.shape).permute(0, 3, 1, 2)
            if name in self.out_features:
                maps[name] = x
        return maps

    def _stages(self) -> list[list[nn.Module]]:
        numbers = range(1, 1 + self.num_stages)
        return [[self.get_submodule(f"{part}{i}") for part in PARTS] for i in numbers]


def _stages(shape: PVTv2Shape, drop_path: float) -> list[list[nn.Module]]:
    """Patch embedding, blocks and norm of each."""
    try:
        from timm.models.pvt_v2 import PyramidVisionTransformerV2
    except ImportError as error:
        raise without_timm("PVTv2", error) from None
    network = PyramidVisionTransformerV2(
        num_classes=0,
        embed_dims=shape.channels,
        depths=shape.depths,
        num_heads=shape.heads,
        mlp_ratios=shape.expansions,
        sr_ratios=shape.reductions,
        drop_path_rate=drop_path,
    )
    stages = []
    for stage in network.stages:
        for block in stage.blocks:
            # The official name has it twice.
            block.mlp.dwconv = nn.Sequential(OrderedDict(dwconv=block.mlp.dwconv))
        stages.append([stage.downsample or network.patch_embed, stage.blocks, stage.norm])
    return stages


def _divided(side: int, feature: str) -> int:
    return -(-side // 2 ** LEVELS[feature])
