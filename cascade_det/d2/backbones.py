"""MobileNets with a feature pyramid as backbones of Detectron2, registered by name."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from cascade_det import config
from cascade_det.backbones import MobileNetV2, MobileNetV3Large
from cascade_det.backbones.mobilenet import MobileNet
from cascade_det.backbones.trunk import LEVELS
from cascade_det.d2.parts import refuse_torchvision_names


class MobileNetBackbone(MobileNet, Backbone):
    """A MobileNet as a ``Backbone`` of Detectron2."""

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every feature."""
        return {
            name: ShapeSpec(channels=width, stride=2 ** LEVELS[name])
            for name, width in self.channels.items()
        }


class MobileNetV2Backbone(MobileNetV2, MobileNetBackbone):
    """:class:`~cascade_det.backbones.MobileNetV2` as a ``Backbone`` of Detectron2."""


class MobileNetV3LargeBackbone(MobileNetV3Large, MobileNetBackbone):
    """:class:`~cascade_det.backbones.MobileNetV3Large` as a ``Backbone`` of Detectron2."""


@BACKBONE_REGISTRY.register()
def build_mobilenet_v2_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """MobileNetV2 with a feature pyramid; reads the keys of ``build_resnet_fpn_backbone``."""
    return _build_fpn(cfg, MobileNetV2Backbone)


@BACKBONE_REGISTRY.register()
def build_mobilenet_v3_large_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """MobileNetV3-Large with a feature pyramid; reads the same keys."""
    return _build_fpn(cfg, MobileNetV3LargeBackbone)


def _build_fpn(cfg: CfgNode, trunk: type[MobileNetBackbone]) -> FPN:
    arguments = config.backbone_arguments(cfg)
    fpn = arguments["fpn"]
    in_features = fpn.pop("in_features")
    bottom_up = trunk(out_features=in_features, **arguments["bottom_up"])
    # Here as well, since the ROI heads may be Detectron2's.
    bottom_up.register_load_state_dict_post_hook(refuse_torchvision_names)
    return FPN(
        bottom_up=bottom_up,
        in_features=in_features,
        top_block=LastLevelMaxPool(),
        **fpn,
    )
