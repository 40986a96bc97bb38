"""Models that cannot be built, and whatever YAML file: an error that names the key."""

from pathlib import Path

import pytest

pytest.importorskip("detectron2.engine", exc_type=ImportError)

import detectron2
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model
from small_backbones import ATTENTION, CASCADE_FPN, HIERVIT, STAGES
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


# Options of a backbone, a key, a wrong value, and what is said of it.
WRONG = [
    (ATTENTION["efficientvit"], "MODEL.EFFICIENTVIT.NAME", "m6", r"EFFICIENTVIT\.NAME is 'm6'.*m0"),
    (
        ATTENTION["efficientvit"],
        "MODEL.EFFICIENTVIT.KERNELS",
        (5, 5),
        r"EFFICIENTVIT\.KERNELS is \[5, 5\].*4 kernels",
    ),
    (
        ATTENTION["efficientvit"],
        "MODEL.EFFICIENTVIT.NECK",
        "maskrcnn",
        r"FPN\.IN_FEATURES is .*'res4', 'res5', 'res6'",
    ),
    (ATTENTION["hatnet"], "MODEL.HATNET.DROP_PATH", 1.5, r"HATNET\.DROP_PATH is 1\.5"),
    (ATTENTION["hatnet"], "MODEL.FPN.IN_FEATURES", ["res2", "res3"], r"FPN\.IN_FEATURES is .*res5"),
    (
        (*CASCADE_FPN["efficientvit_cascade"], *STAGES),
        "MODEL.EFFICIENTVIT.NECK",
        "maskrcnn",
        r"EFFICIENTVIT\.NECK is 'maskrcnn', but build_efficientvit_cascade_fpn_backbone",
    ),
    (
        CASCADE_FPN["hatnet_cascade"],
        "MODEL.FPN.NORM",
        "GN",
        r"FPN\.NORM is 'GN'.*does not read it",
    ),
    (HIERVIT, "MODEL.HIERVIT.WIDTHS", (32, 32), r"HIERVIT\.WIDTHS is \[32, 32\].*3 stages"),
    (HIERVIT, "MODEL.HIERVIT.MIXER", "mlp", r"HIERVIT\.MIXER is 'mlp'.*token_groups"),
]


@pytest.mark.parametrize(
    ("backbone", "key", "value", "message"),
    WRONG,
    ids=[key.split(".", 1)[1] for _, key, *_ in WRONG],
)
def test_wrong_keys_of_our_backbones_are_named(backbone, key, value, message):
    """Without one of our commands, with Detectron2's own heads."""
    cfg = get_cfg()
    add_cascade_config(cfg)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *backbone, key, value])
    with pytest.raises(ConfigError, match=message) as error:
        build_backbone(cfg)
    assert str(error.value).count("MODEL.") == 1


def test_a_resnet_without_the_maps_of_the_cascade_decoder():
    cfg = get_cfg()
    cfg.merge_from_list([*CASCADE_FPN["resnet_cascade"], "MODEL.FPN.IN_FEATURES", ["res4", "res5"]])
    with pytest.raises(ConfigError, match=r"RESNETS\.OUT_FEATURES is \['res4'\].* needs res5"):
        build_backbone(cfg)


@pytest.mark.parametrize("name", ["efficientvit", "hatnet", "hiervit"])
def test_our_backbones_need_no_nodes_of_ours(name):
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = f"build_{name}_fpn_backbone"
    with pytest.raises(ConfigError, match=r"MODEL\.FPN\.IN_FEATURES is \[\]"):
        build_backbone(cfg)
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4"]
    cfg.MODEL.FPN.IN_FEATURES += {"efficientvit": ["res5", "res6"], "hatnet": ["res5"]}.get(
        name, []
    )
    shapes = build_backbone(cfg).output_shape()
    levels = range(2, 8 if name == "efficientvit" else 7)
    assert {map_: shape.stride for map_, shape in shapes.items()} == {
        f"p{level}": 2**level for level in levels
    }
    assert not hasattr(cfg.MODEL, "EFFICIENTVIT")


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
