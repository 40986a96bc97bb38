"""EfficientViT M0 to M5, arXiv 2305.07027, as trunks of detectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cascade_det.backbones.efficientvit_layers import Block, between_stages, stem
from cascade_det.backbones.trunk import LEVELS, check_features
from cascade_det.layers.conv_norm import freeze


@dataclass(frozen=True)
class EfficientViTShape:
    """Sizes of a network; one entry per stage.

    Attributes:
        channels: of the stages.
        depths: blocks of the stages.
        heads: of the attention.
        kernels: of the queries of each head, the same for all stages.
        windows: of the attention, side in tokens.
    """

    channels: tuple[int, int, int]
    depths: tuple[int, int, int]
    heads: tuple[int, int, int]
    kernels: tuple[int, ...] = (7, 5, 3, 3)
    windows: tuple[int, int, int] = (7, 7, 7)


# Table 1 of the paper; kernels of the published classifiers.
SHAPES = {
    "m0": EfficientViTShape((64, 128, 192), (1, 2, 3), (4, 4, 4), (5, 5, 5, 5)),
    "m1": EfficientViTShape((128, 144, 192), (1, 2, 3), (2, 3, 3)),
    "m2": EfficientViTShape((128, 192, 224), (1, 2, 3), (4, 3, 2)),
    "m3": EfficientViTShape((128, 240, 320), (1, 2, 3), (4, 3, 4), (5, 5, 5, 5)),
    "m4": EfficientViTShape((128, 256, 384), (1, 2, 3), (4, 4, 4)),
    "m5": EfficientViTShape((192, 288, 384), (1, 3, 4), (3, 3, 4)),
}


class EfficientViT(nn.Module):
    """EfficientViT without its head.

    State-dict names are the official ones (``blocks1.0.mixer.m.attn.qkvs.0.c.weight``). ``res4``,
    ``res5`` and ``res6`` are the ends of the three stages. ``res2`` and ``res3`` are maps of the
    stem, after its second and third convolution, of a quarter and half of the first stage's
    channels.

    Args:
        name: ``m0`` to ``m5``.
        shape: sizes of another network, in place of a named one.
        out_features: names from ``res2`` to ``res6``, strides 4 to 64; later layers are not built.
        kernels: of the queries of each head; empty: the network's own. The published detection
            trunk M0 has ``(7, 5, 3, 3)``, the classifier ``(5, 5, 5, 5)``.
        freeze_at: 0 trains all; 1 freezes the stem, 2 also the first stage, and so on.
        norm_eval: whether statistics of batch norms stay as they are in training; their weights
            and biases are trained.

    Attributes:
        channels: output channels by feature name.

    Raises:
        ValueError: for an unknown name or feature, or fewer kernels than heads.
    """

    def __init__(
        self,
        *,
        name: str = "m4",
        shape: EfficientViTShape | None = None,
        out_features: Sequence[str] = ("res4", "res5", "res6"),
        kernels: Sequence[int] = (),
        freeze_at: int = 0,
        norm_eval: bool = False,
    ) -> None:
        super().__init__()
        if shape is None:
            if name not in SHAPES:
                raise ValueError(f"unknown EfficientViT {name!r}; known: {', '.join(SHAPES)}")
            shape = SHAPES[name]
        self.out_features = check_features(out_features, LEVELS)
        self.norm_eval = norm_eval
        widths = (shape.channels[0] // 4, shape.channels[0] // 2, *shape.channels)
        channels = dict(zip(LEVELS, widths, strict=True))
        self.channels = {name: channels[name] for name in self.out_features}
        last = max(LEVELS[name] for name in self.out_features)
        # Convolutions and activations take turns.
        self.patch_embed = stem(shape.channels[0])[: 2 * last]
        stages = max(0, last - LEVELS["res3"])
        for i in range(stages):
            layers = between_stages(*shape.channels[i - 1 : i + 1]) if i else []
            layers += [
                Block(
                    shape.channels[i],
                    heads=shape.heads[i],
                    kernels=tuple(kernels) or shape.kernels,
                    window=shape.windows[i],
                )
                for _ in range(shape.depths[i])
            ]
            self.add_module(f"blocks{i + 1}", nn.Sequential(*layers))
        self.num_stages = stages
        for part in [self.patch_embed, *self._stages()][:freeze_at]:
            freeze(part)

    def stem_and_stages(self) -> tuple[nn.Module, list[nn.Module]]:
        """The four convolutions up to stride 16, and the stages."""
        return self.patch_embed, self._stages()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images ``[N, 3, H, W]`` to the maps of ``out_features`` by name, strides 4 to 64."""
        # Attention reads tokens, so that all maps are channels-last.
        maps, x = {}, images.contiguous(memory_format=torch.channels_last)
        for i, layer in enumerate(self.patch_embed):
            x = layer(x)
            # After the activations of the second and third convolution.
            if i in (3, 5):
                maps[f"res{(i + 1) // 2}"] = x
        for i, stage in enumerate(self._stages()):
            maps[f"res{4 + i}"] = x = stage(x)
        return {name: maps[name] for name in self.out_features}

    def train(self, mode: bool = True) -> EfficientViT:
        """Training or evaluation mode; with ``norm_eval`` batch norms stay in evaluation mode."""
        super().train(mode)
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _stages(self) -> list[nn.Module]:
        return [self.get_submodule(f"blocks{i + 1}") for i in range(self.num_stages)]
