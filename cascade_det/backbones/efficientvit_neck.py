"""The pyramids of EfficientViT's published detectors, under the official state-dict names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable

from torch import Tensor, nn
from torch.nn import functional as F

from cascade_det.backbones.trunk import Trunk
from cascade_det.layers.conv_norm import ConvNorm

_FEATURES = ("res4", "res5", "res6")
# Levels finer than the trunk's, of five.
_FINER = {"retinanet": 1, "maskrcnn": 2}


class EfficientViTFPN(nn.Module):
    """Top-down pathway over strides 16 to 64, and transposed convolutions to finer levels.

    ``retinanet`` has outputs ``p3`` to ``p7``, the last by a strided convolution on the trunk's
    coarsest map; ``maskrcnn`` has ``p2`` to ``p6``.

    Args:
        bottom_up: the trunk, with features ``res4``, ``res5`` and ``res6``.
        kind: ``retinanet`` or ``maskrcnn``.
        out_channels: C of every level.

    Attributes:
        strides: stride in pixels by output name, finest first.
        size_divisibility: image sides must be multiples of it, for each map to have
            ``side / stride`` rows, rounded up.

    Raises:
        ValueError: for an unknown kind, or if the trunk has other features.
    """

    size_divisibility = 32

    def __init__(
        self, bottom_up: Trunk, *, kind: str = "retinanet", out_channels: int = 256
    ) -> None:
        super().__init__()
        if kind not in _FINER:
            raise ValueError(f"unknown pyramid {kind!r}; known: {', '.join(_FINER)}")
        self.in_features = tuple(bottom_up.out_features)
        if self.in_features != _FEATURES:
            raise ValueError(f"needs the features {_FEATURES}, not {self.in_features}")
        finer = _FINER[kind]
        self.out_channels = out_channels
        self.strides = {f"p{level}": 2**level for level in range(4 - finer, 9 - finer)}
        channels = [bottom_up.channels[name] for name in _FEATURES]
        c = out_channels
        self.lateral_convs = _convs(ConvNorm(width, c, 1) for width in channels)
        coarser = [ConvNorm(channels[-1], c, 3, stride=2)] * (2 - finer)
        self.fpn_convs = _convs([*(ConvNorm(c, c, 3) for _ in channels), *coarser])
        self.extra_trans_convs = _convs(nn.ConvTranspose2d(c, c, 2, 2) for _ in range(finer))
        self.extra_fpn_convs = _convs(ConvNorm(c, c, 3) for _ in range(finer))
        for conv in self.modules():
            if isinstance(conv, ConvNorm | nn.ConvTranspose2d):
                _initialise(conv)
        self.bottom_up = bottom_up

    def laterals_and_outputs(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """The layers that take maps of the trunk, and all others."""
        takers = [*self.lateral_convs, *self.fpn_convs[3:]]
        others = [*self.fpn_convs[:3], *self.extra_trans_convs, *self.extra_fpn_convs]
        return takers, others

    def freeze_unread(self, names: Collection[str]) -> None:
        """Freeze the layers that only maps which are not read depend on.

        They get no gradients, but distributed training waits for the gradients of every parameter
        that is not frozen.

        Args:
            names: of the maps that are read.
        """
        needed = {layer for name in names for layer in self._layers_before(name)}
        takers, others = self.laterals_and_outputs()
        for layer in {*takers, *others} - needed:
            layer.requires_grad_(False)

    def _layers_before(self, name: str) -> list[nn.Module]:
        """All layers that an output depends on."""
        place, finer = list(self.strides).index(name), len(self.extra_trans_convs)
        if place < finer:
            transposed = self.extra_trans_convs[: finer - place]
            return [self.extra_fpn_convs[place], *transposed, *self.lateral_convs]
        place -= finer
        # The last convolution of four reads the trunk: no lateral one is left for it.
        return [self.fpn_convs[place], *self.lateral_convs[place:]]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images ``[N, 3, H, W]``, sides multiples of ``size_divisibility``, to maps by name."""
        maps = self.bottom_up(images)
        merged = [
            conv(maps[name]) for conv, name in zip(self.lateral_convs, _FEATURES, strict=True)
        ]
        for i in (1, 0):
            size = merged[i].shape[-2:]
            merged[i] = merged[i] + F.interpolate(merged[i + 1], size=size, mode="nearest")
        outputs = [
            conv(x) for conv, x in zip(self.fpn_convs, [*merged, maps["res6"]], strict=False)
        ]
        x = merged[0]
        # Chained from the coarsest; their outputs' convolutions are finest first.
        for transposed, conv in zip(
            self.extra_trans_convs, reversed(self.extra_fpn_convs), strict=True
        ):
            x = transposed(x)
            outputs.insert(0, conv(x))
        return dict(zip(self.strides, outputs, strict=True))


def _convs(convs: Iterable[nn.Module]) -> nn.ModuleList:
    return nn.ModuleList(nn.Sequential(OrderedDict(conv=conv)) for conv in convs)


def _initialise(conv: ConvNorm | nn.ConvTranspose2d) -> None:
    if isinstance(conv, nn.ConvTranspose2d):
        nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    else:
        nn.init.xavier_uniform_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
