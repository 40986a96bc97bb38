"""Models that cannot be built, and whatever YAML file: an error that names the key."""

from pathlib import Path

import pytest

pytest.importorskip("detectron2.engine", exc_type=ImportError)

import detectron2
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from small_plugin import OURS

from cascade_det import standalone
from cascade_det.d2 import add_cascade_config, host
from cascade_det.errors import ConfigError
from cascade_det.standalone import host as standalone_host

pytestmark = pytest.mark.needs_detectron2

REPOSITORY = Path(detectron2.__file__).parents[1]
# A model without a pyramid, as Detectron2's Base-RCNN-C4.yaml has it.
C4 = """
MODEL:
  META_ARCHITECTURE: "GeneralizedRCNN"
  DEVICE: "cpu"
  RPN:
    PRE_NMS_TOPK_TEST: 6000
    POST_NMS_TOPK_TEST: 1000
  ROI_HEADS:
    NAME: "Res5ROIHeads"
"""
NAMES = {
    "MODEL.META_ARCHITECTURE": "FastRCNN",
    "MODEL.BACKBONE.NAME": "build_vit",
    "MODEL.PROPOSAL_GENERATOR.NAME": "",
    "MODEL.ROI_HEADS.NAME": "EarlyExitROIHeads",
    "MODEL.RPN.HEAD_NAME": "RPNHead",
    "MODEL.ANCHOR_GENERATOR.NAME": "AnchorGenerator",
}


@pytest.fixture
def c4(tmp_path):
    (tmp_path / "c4.yaml").write_text(C4)
    return tmp_path / "c4.yaml"


@pytest.mark.parametrize(("key", "value"), NAMES.items())
def test_names_that_are_not_registered(key, value, make_cfg):
    with pytest.raises(ConfigError, match=f"{key} is '{value}'.*Registered are ") as error:
        make_cfg(key, value)
    assert str(error.value).count("MODEL.") == 1


class TestModelsWithoutAPyramid:
    def test_our_heads_are_not_for_them(self, c4):
        cfg = host.load_config(c4, ["MODEL.ROI_HEADS.NAME", OURS])
        host.check_config(cfg)  # maps are known when a backbone is built
        with pytest.raises(ConfigError, match=r"(?s)MODEL\.ROI_BOX_HEAD\.NAME is ''.*pyramid"):
            build_model(cfg)

    def test_in_a_plain_script(self, c4):
        cfg = get_cfg()
        add_cascade_config(cfg)
        cfg.merge_from_file(str(c4))
        cfg.merge_from_list(
            ["MODEL.ROI_HEADS.NAME", OURS, "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"]
        )
        cfg.merge_from_list(["MODEL.ROI_BOX_HEAD.NUM_FC", 1])
        cfg.merge_from_list(["MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3"]])
        with pytest.raises(ConfigError, match=r"IN_FEATURES is \['p2', 'p3'\].* are res4"):
            build_model(cfg)

    @pytest.mark.parametrize("name", ["resnet", "mobilenet_v2", "mobilenet_v3_large"])
    def test_a_pyramid_without_maps(self, c4, name):
        backbone = ["MODEL.BACKBONE.NAME", f"build_{name}_fpn_backbone"]
        with pytest.raises(ConfigError, match=r"MODEL\.FPN\.IN_FEATURES is \[\]"):
            host.check_config(host.load_config(c4, backbone))
        levels = "['res2', 'res3', 'res4', 'res5']"
        with pytest.raises(ConfigError, match=r"MODEL\.RPN\.IN_FEATURES is \['res4'\].*p2, p3"):
            host.check_config(host.load_config(c4, [*backbone, "MODEL.FPN.IN_FEATURES", levels]))

    def test_the_standalone_host_names_what_it_has(self, c4):
        with pytest.raises(ConfigError, match=r"MODEL\.BACKBONE\.NAME is 'build_resnet_backbone'"):
            standalone.build_detector(standalone_host.load_config(c4))


@pytest.mark.skipif(not (REPOSITORY / "configs").is_dir(), reason="Detectron2's are not there")
@pytest.mark.parametrize("one", [host, standalone_host], ids=["detectron2", "standalone"])
def test_every_file_of_detectron2s_is_taken_or_refused_by_an_error_of_ours(one):
    files = list((REPOSITORY / "configs").rglob("*.yaml"))
    taken = 0
    for file in files:
        try:
            one.check_config(one.load_config(file))
            taken += 1
        except ConfigError:
            pass
    assert len(files) > 50
    assert taken > 40 or one is standalone_host
