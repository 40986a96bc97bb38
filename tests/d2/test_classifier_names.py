"""Weights of classifiers in plain scripts of Detectron2: fitted, or refused."""

from functools import partial

import pytest
import torch

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from small_plugin import model_cfg
from torchvision.models import mobilenet_v2, mobilenet_v3_large, resnet18

from cascade_det.backbones import EfficientViT, HATNet
from cascade_det.errors import CheckpointError
from cascade_det.weights import load_weights

pytestmark = pytest.mark.needs_detectron2


MOBILENET = ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.BACKBONE.NAME"]
TRUNKS = {
    "MobileNetV2": (
        mobilenet_v2,
        [*MOBILENET, "build_mobilenet_v2_fpn_backbone"],
        "features.0.0.weight",
    ),
    "MobileNetV2 with other heads": (
        mobilenet_v2,
        [
            *(*MOBILENET, "build_mobilenet_v2_fpn_backbone"),
            *("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.CASCADE.EXIT.ENABLED", False),
        ],
        "features.0.0.weight",
    ),
    "MobileNetV3": (
        mobilenet_v3_large,
        [*MOBILENET, "build_mobilenet_v3_large_fpn_backbone"],
        "features.0.0.weight",
    ),
    "EfficientViT": (
        partial(EfficientViT, name="m0"),
        [
            *("MODEL.BACKBONE.NAME", "build_efficientvit_fpn_backbone"),
            *("MODEL.EFFICIENTVIT.NAME", "m0"),
            *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5", "res6"]),
        ],
        "patch_embed.0.c.weight",
    ),
    "HAT-Net": (
        partial(HATNet, name="tiny"),
        ["MODEL.BACKBONE.NAME", "build_hatnet_fpn_backbone"],
        "patch_embed.0.weight",
    ),
    "ResNet with the CASCADE decoder and other heads": (
        resnet18,
        [
            *("MODEL.BACKBONE.NAME", "build_resnet_cascade_fpn_backbone"),
            *("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", ""),
            *("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.CASCADE.EXIT.ENABLED", False),
        ],
        "stem.conv1.weight",
    ),
    "ResNet": (resnet18, ["MODEL.RESNETS.NORM", "FrozenBN"], "stem.conv1.weight"),
}


@pytest.mark.parametrize(("build", "options", "ours"), TRUNKS.values(), ids=TRUNKS)
class TestWeightsOfClassifiers:
    """Under names that Detectron2 does not know: not one of them would reach the trunk."""

    @pytest.fixture
    def case(self, build, options, tmp_path):
        weights = build().state_dict()
        torch.save(weights, tmp_path / "trunk.pth")
        options = [*options, "OUTPUT_DIR", str(tmp_path)]
        cfg = model_cfg(options=options)
        cfg.MODEL.WEIGHTS = str(tmp_path / "trunk.pth")
        return cfg, weights

    def test_detectron2s_checkpointer_is_stopped(self, case, ours):
        cfg, _ = case
        with pytest.raises(CheckpointError, match=r"names of a classifier.*load_weights"):
            DetectionCheckpointer(build_model(cfg)).load(cfg.MODEL.WEIGHTS)

    def test_the_remedy_works(self, case, ours):
        cfg, weights = case
        model = build_model(cfg)
        load_weights(model, cfg.MODEL.WEIGHTS)
        first = weights.get("conv1.weight", weights.get(ours))
        assert torch.equal(model.backbone.bottom_up.state_dict()[ours], first)
        # Its own names are nothing to be afraid of.
        torch.save(model.state_dict(), cfg.MODEL.WEIGHTS)
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)


def test_a_checkpoint_that_is_resumed_or_loaded_may_lack_a_trunk(tmp_path):
    """Its names are not a classifier's, and Detectron2 says what is missing."""
    model = build_model(model_cfg())
    heads = {k: v for k, v in model.state_dict().items() if k.startswith("roi_heads")}
    torch.save(heads, tmp_path / "heads.pth")
    DetectionCheckpointer(model).load(str(tmp_path / "heads.pth"))
