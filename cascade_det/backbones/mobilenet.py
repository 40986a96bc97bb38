"""torchvision's MobileNets as light trunks, with the feature names and freezing of our ResNets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torchvision.models import mobilenet_v2, mobilenet_v3_large

from cascade_det.backbones.resnet import STAGE_NAMES
from cascade_det.backbones.trunk import check_features
from cascade_det.layers.conv_norm import NORMS, freeze


class MobileNet(nn.Module):
    """A MobileNet whose features are the last layers of strides 4 to 32.

    State-dict names are torchvision's (``features.0.0.weight``).

    Args:
        out_features: names from ``res2`` to ``res5``, strides 4 to 32.
        norm: ``BN``, ``SyncBN`` or ``FrozenBN``.
        freeze_at: 0 trains all; 1 freezes up to stride 2, 2 also stride 4, and so on.

    Attributes:
        last_layers: indices of the last layers of strides 4 to 32.
        channels: output channels by feature name.

    Raises:
        ValueError: for an unknown feature name.
    """

    last_layers: tuple[int, int, int, int]

    def __init__(
        self,
        *,
        out_features: tuple[str, ...] = STAGE_NAMES,
        norm: str = "BN",
        freeze_at: int = 0,
    ) -> None:
        super().__init__()
        self.out_features = check_features(out_features, STAGE_NAMES)
        layers = self.layers(NORMS[norm])
        last = dict(zip(STAGE_NAMES, self.last_layers, strict=True))
        self.features = layers[: 1 + max(last[name] for name in out_features)]
        self.channels = {name: _out_channels(layers[last[name]]) for name in out_features}
        # 1 freezes the layers up to stride 2, like the stem of a ResNet.
        frozen = {0: 0, 1: 2}.get(freeze_at)
        if frozen is None:
            frozen = 1 + self.last_layers[min(freeze_at, 5) - 2]
        freeze(self.features[:frozen])

    @staticmethod
    def layers(norm: Callable[..., nn.Module]) -> nn.Sequential:
        """Torchvision's layers, with this norm."""
        raise NotImplementedError

    def stem_and_stages(self) -> tuple[nn.Module, list[nn.Module]]:
        """The first layer, and the others."""
        return self.features[0], list(self.features[1:])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images ``[N, 3, H, W]`` to the maps of ``out_features`` by name, strides 4 to 32."""
        names = dict(zip(self.last_layers, STAGE_NAMES, strict=True))
        maps, x = {}, images
        for i, layer in enumerate(self.features):
            x = layer(x)
            if names.get(i) in self.out_features:
                maps[names[i]] = x
        return maps


class MobileNetV2(MobileNet):
    """MobileNetV2 (arXiv 1801.04381) without its last convolution; see ``MobileNet``."""

    last_layers = (3, 6, 13, 17)

    @staticmethod
    def layers(norm: Callable[..., nn.Module]) -> nn.Sequential:
        """Torchvision's layers, with this norm."""
        return mobilenet_v2(norm_layer=norm).features


class MobileNetV3Large(MobileNet):
    """MobileNetV3-Large (arXiv 1905.02244) without its last convolution; see ``MobileNet``."""

    last_layers = (3, 6, 12, 15)

    @staticmethod
    def layers(norm: Callable[..., nn.Module]) -> nn.Sequential:
        """Torchvision's layers, with this norm."""
        # TensorFlow's epsilon, with which the published weights were trained.
        return mobilenet_v3_large(norm_layer=partial(norm, eps=0.001)).features


def _out_channels(layer: nn.Module) -> int:
    return [m for m in layer.modules() if isinstance(m, nn.Conv2d)][-1].out_channels
