"""MaxViT (arXiv 2204.01697) and MaxxViT: convolutions, window and grid attention, from timm."""

from __future__ import annotations

from torch import Tensor, nn

from cascade_det.backbones.timm_extra import without_timm
from cascade_det.backbones.trunk import check_features

STAGE_NAMES = ("res2", "res3", "res4", "res5")
# Sides of the images of their weights, in pixels.
SIDES = {
    "maxvit_tiny_rw_224": 224,
    "maxvit_rmlp_tiny_rw_256": 256,
    "maxvit_rmlp_small_rw_224": 224,
    "maxxvit_rmlp_small_rw_256": 256,
}


class MaxViT(nn.Module):
    """An encoder of MERIT (arXiv 2303.16892): the ends of its stages, of strides 4 to 32.

    Its layers and state-dict names are timm's, without the classifier
    (``stages.0.blocks.0.attn_grid.attn.qkv.weight``). The last map is normalised, the others are
    not. MERIT small reads 256 pixels with ``maxxvit_rmlp_small_rw_256``, which has ConvNeXt blocks
    in place of MBConv, and 224 with ``maxvit_rmlp_small_rw_224``; tiny reads them with
    ``maxvit_rmlp_tiny_rw_256`` and ``maxvit_tiny_rw_224``.

    Args:
        name: a key of ``SIDES``.
        side: of the images, in pixels, a multiple of 32, of which a window or a cell of the grid
            has as many pixels as there are; ``None`` is that of ``SIDES``. Weights of another side
            fit, but for the tables of position biases of ``maxvit_tiny_rw_224``.
        out_features: names from ``res2`` to ``res5``; stages after the last are not built.
        freeze_at: 0 trains all; 1 freezes the stem, 2 also the first stage, and so on. Frozen parts
            stay in evaluation mode.

    Attributes:
        channels: output channels by feature name.
        side: of the images that it takes, in pixels.

    Raises:
        ConfigError: timm cannot be imported.
        ValueError: for an unknown name or feature, or another side.
    """

    def __init__(
        self,
        *,
        name: str = "maxvit_rmlp_small_rw_224",
        side: int | None = None,
        out_features: tuple[str, ...] = STAGE_NAMES,
        freeze_at: int = 0,
    ) -> None:
        super().__init__()
        if name not in SIDES:
            raise ValueError(f"unknown MaxViT {name!r}; known: {', '.join(SIDES)}")
        try:
            import timm
        except ImportError as error:
            raise without_timm(name, error) from None
        self.name, self.side = name, side or SIDES[name]
        if self.side % 32:
            raise ValueError(f"{name} takes sides that are multiples of 32, not {self.side}")
        self.out_features = check_features(out_features, STAGE_NAMES)
        self.freeze_at = freeze_at
        network = timm.create_model(name, pretrained=False, num_classes=0, img_size=self.side)
        indices = [STAGE_NAMES.index(feature) for feature in self.out_features]
        # Its first feature is the stem's.
        self.channels = {STAGE_NAMES[i]: network.feature_info[i + 1]["num_chs"] for i in indices}
        self.stem = network.stem
        self.stages = network.stages[: 1 + max(indices)]
        if "res5" in self.out_features:
            self.norm = network.norm
        for part in self._frozen():
            part.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> MaxViT:
        """As for any module, but frozen parts stay in evaluation mode."""
        super().train(mode)
        for part in self._frozen():
            part.eval()
        return self

    def stem_and_stages(self) -> tuple[nn.Module, list[nn.Module]]:
        """The two convolutions to stride 2; the stages and the norm."""
        return self.stem, [*self.stages, *([self.norm] if "res5" in self.out_features else [])]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images ``[N, 3, side, side]`` to the maps of ``out_features`` by name.

        Raises:
            ValueError: the images have another size.
        """
        height, width = images.shape[-2:]
        if (height, width) != (self.side, self.side):
            raise ValueError(
                f"{self.name} takes images of {self.side} x {self.side} pixels, not of "
                f"{height} x {width}: resize them"
            )
        maps, x = {}, self.stem(images)
        for name, stage in zip(STAGE_NAMES, self.stages, strict=False):
            x = stage(x)
            if name in self.out_features:
                maps[name] = self.norm(x) if name == "res5" else x
        return maps

    def _frozen(self) -> list[nn.Module]:
        return [self.stem, *self.stages][: self.freeze_at]
