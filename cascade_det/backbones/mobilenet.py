"""torchvision's MobileNets as light trunks, with the feature names and freezing of our ResNets."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torchvision.models import mobilenet_v2, mobilenet_v3_large

from cascade_det.layers import NORMS, freeze


class _MobileNet(nn.Module):
    """A MobileNet whose features are the last layers of strides 4 to 32.

    State-dict names are torchvision's (``features.0.0.weight``).
    """

    def __init__(
        self,
        layers: nn.Sequential,
        last_layers: tuple[int, int, int, int],
        out_features: tuple[str, ...],
        freeze_at: int,
    ) -> None:
        super().__init__()
        self.last_layers = dict(zip(("res2", "res3", "res4", "res5"), last_layers, strict=True))
        unknown = set(out_features) - set(self.last_layers)
        if unknown or not out_features:
            raise ValueError(
                f"unknown features {sorted(unknown)}; known: {', '.join(self.last_layers)}"
            )
        self.out_features = tuple(out_features)
        self.features = layers[: 1 + max(self.last_layers[name] for name in out_features)]
        self.channels = {
            name: _out_channels(layers[self.last_layers[name]]) for name in out_features
        }
        # 1 freezes the layers up to stride 2, like the stem of a ResNet.
        frozen = {0: 0, 1: 2}.get(freeze_at)
        if frozen is None:
            frozen = 1 + last_layers[min(freeze_at, 5) - 2]
        freeze(self.features[:frozen])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images ``[N, 3, H, W]`` to the maps of ``out_features`` by name, strides 4 to 32."""
        names = {self.last_layers[name]: name for name in self.out_features}
        maps, x = {}, images
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in names:
                maps[names[i]] = x
        return maps


class MobileNetV2(_MobileNet):
    """MobileNetV2 (arXiv 1801.04381) without its last convolution.

    Args:
        out_features: names from ``res2`` to ``res5``, strides 4 to 32.
        norm: ``BN``, ``SyncBN`` or ``FrozenBN``.
        freeze_at: 0 trains all; 1 freezes up to stride 2, 2 also stride 4, and so on.

    Raises:
        ValueError: for an unknown feature name.
    """

    def __init__(
        self,
        *,
        out_features: tuple[str, ...] = ("res2", "res3", "res4", "res5"),
        norm: str = "BN",
        freeze_at: int = 0,
    ) -> None:
        layers = mobilenet_v2(norm_layer=NORMS[norm]).features
        super().__init__(layers, (3, 6, 13, 17), out_features, freeze_at)


class MobileNetV3Large(_MobileNet):
    """MobileNetV3-Large (arXiv 1905.02244) without its last convolution; see ``MobileNetV2``."""

    def __init__(
        self,
        *,
        out_features: tuple[str, ...] = ("res2", "res3", "res4", "res5"),
        norm: str = "BN",
        freeze_at: int = 0,
    ) -> None:
        # TensorFlow's epsilon, with which the published weights were trained.
        layers = mobilenet_v3_large(norm_layer=partial(NORMS[norm], eps=0.001)).features
        super().__init__(layers, (3, 6, 12, 15), out_features, freeze_at)


def _out_channels(layer: nn.Module) -> int:
    return [m for m in layer.modules() if isinstance(m, nn.Conv2d)][-1].out_channels
