"""Every configuration that is shipped gives a detector, with Detectron2's names."""

import math

import pytest
import torch
from parity import description
from shape_runs import ROOT
from small_backbones import ATTENTION, CASCADE_FPN

from cascade_det.config import load_config
from cascade_det.errors import ConfigError
from cascade_det.standalone import build_detector
from cascade_det.standalone.build_segmenter import build_segmenter

SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))
LIGHT = {
    "mobilenet_v2": ("MODEL.BACKBONE.NAME", "build_mobilenet_v2_fpn_backbone"),
    "mobilenet_v3": ("MODEL.BACKBONE.NAME", "build_mobilenet_v3_large_fpn_backbone"),
    **ATTENTION,
    **CASCADE_FPN,
}


def build_without_memory(cfg):
    """On the meta device parameters have shapes and no values, which is all that counts here."""
    cfg.MODEL.DEVICE = "cpu"
    with torch.device("meta"):
        return build_detector(cfg)


SEGMENTERS = {
    "Base-Cascade-Segmenter",
    "cascade_pvtv2_b2",
    "cascade_resnet50",
    "merit_small",
    "segment_shapes",
}


@pytest.mark.parametrize(
    "path", [path for path in SHIPPED if path.stem in SEGMENTERS], ids=lambda path: path.stem
)
def test_every_shipped_segmenter_builds(path, monkeypatch):
    if "pvtv2" in path.stem or "merit" in path.stem:
        pytest.importorskip("timm")
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_: module)
    cfg = load_config(path)
    cfg.MODEL.DEVICE = "cpu"
    with torch.device("meta"):
        segmenter = build_segmenter(cfg)
    if cfg.MODEL.DUAL_SCALE.MODE == "off":
        heads = [*segmenter.sem_seg_head.heads]
    else:
        heads = [segmenter.get_submodule(f"out_head{i}") for i in range(1, 5)]
    assert [head.out_channels for head in heads] == [cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES] * 4
    assert cfg.CASCADE.BEST_METRIC == "sem_seg/mIoU"


def test_merit_small_is_the_published_network(monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_: module)
    cfg = load_config(ROOT / "configs" / "SemanticSegmentation" / "merit_small.yaml")
    cfg.MODEL.DEVICE, cfg.MODEL.DUAL_SCALE.MODE = "cpu", "parallel"
    with torch.device("meta"):
        segmenter = build_segmenter(cfg)
    assert sum(x.numel() for x in segmenter.parameters()) == 147_859_859
    shapes = description("state_dict_shapes")
    found = {key: list(x.shape) for key, x in segmenter.state_dict().items()}
    for i, name in ((1, "maxxvit_rmlp_small_rw_256"), (2, "maxvit_rmlp_small_rw_224")):
        official = shapes[f"merit_backbone_{name}"]["state_dict"]
        prefix = f"backbone{i}."
        ours = {key: shape for key, shape in found.items() if key.startswith(prefix)}
        assert ours == {prefix + key: shape for key, shape in official.items()}


@pytest.mark.parametrize(
    "path", [path for path in SHIPPED if path.stem not in SEGMENTERS], ids=lambda path: path.stem
)
def test_every_shipped_configuration_builds(path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_: module)
    # Exits and augmentation are put on top of a cascade.
    on_top = path.parent.name in ("exits", "augment")
    below = [ROOT / "configs" / "Base-Cascade-RCNN-FPN.yaml"] * on_top
    cfg = load_config([*below, path])
    detector = build_without_memory(cfg)
    names = set(detector.state_dict())
    stages = len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
    assert f"roi_heads.box_predictor.{stages - 1}.cls_score.weight" in names
    assert f"roi_heads.box_predictor.{stages}.cls_score.weight" not in names
    if cfg.MODEL.BACKBONE.NAME == "build_resnet_fpn_backbone":
        assert {
            "backbone.bottom_up.stem.conv1.weight",
            "backbone.bottom_up.res2.0.conv1.norm.running_mean",
        } <= names
    assert {
        "backbone.fpn_lateral2.weight",
        "proposal_generator.rpn_head.objectness_logits.bias",
        "roi_heads.box_head.0.fc1.weight",
    } <= names
    predictor = detector.roi_heads.box_predictor[0].cls_score
    assert predictor.out_features == cfg.MODEL.ROI_HEADS.NUM_CLASSES + 1
    exits = cfg.MODEL.CASCADE.EXIT.ENABLED
    assert (detector.roi_heads.exits is not None) == exits


def make_sample():
    return {
        "image": torch.randint(0, 256, (3, 70, 100), dtype=torch.uint8),
        "gt_boxes": torch.tensor([[10.0, 10, 50, 60]]),
        "gt_classes": torch.tensor([2]),
        "gt_masks": [[torch.tensor([10.0, 10, 50, 10, 30, 60], dtype=torch.float64)]],
    }


def assert_all_is_trained(detector):
    """What needs a gradient has one; distributed training waits for each."""
    sum(detector.losses([make_sample()]).values()).backward()
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("name", LIGHT)
def test_light_backbones_train_and_detect(instant_cfg, name):
    instant_cfg.merge_from_list([*LIGHT[name], "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.FPN.NORM", ""])
    instant_cfg.merge_from_list(["MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8])
    detector = build_detector(instant_cfg)
    if name.startswith("mobilenet"):
        assert "backbone.bottom_up.features.0.0.weight" in detector.state_dict()
    images, _ = detector.preprocess([make_sample()["image"]])
    height, width = images.shape[-2:]
    sizes = {level: tuple(x.shape[-2:]) for level, x in detector.backbone(images).items()}
    from_p3 = ("efficientvit", "efficientvit_retinanet", "efficientvit_cascade")
    levels = range(3, 8) if name in from_p3 else range(2, 7)
    assert sizes == {
        f"p{level}": (math.ceil(height / 2**level), math.ceil(width / 2**level)) for level in levels
    }
    assert all(parameter.requires_grad for parameter in detector.parameters())
    assert_all_is_trained(detector)
    (found,) = detector.eval().detect([make_sample()]).detections
    assert found.masks.shape == (len(found), 28, 28)


# Maps that the RPN reads, and the heads; then the layers that none of these maps depends on.
READ = [
    ("efficientvit", "p4 p5", "p4", "fpn_lateral3 fpn_output3 fpn_output6"),
    ("efficientvit", "p7", "p6", "fpn_lateral3-5 fpn_output3-5"),
    (
        *("efficientvit_retinanet", "p5 p6", "p5"),
        "lateral_convs.0 fpn_convs.0 fpn_convs.3 extra_trans_convs.0 extra_fpn_convs.0",
    ),
    (
        *("efficientvit_retinanet", "p7", "p7"),
        "lateral_convs.0-2 fpn_convs.0-2 extra_trans_convs.0 extra_fpn_convs.0",
    ),
    (
        *("efficientvit_maskrcnn", "p3 p4", "p3"),
        "fpn_convs.1-2 extra_trans_convs.1 extra_fpn_convs.0",
    ),
    ("hiervit", "p3 p4 p5", "p3", "fpn_lateral2 fpn_output2 top_block.p6"),
    ("hiervit", "p6", "p6", "fpn_lateral2-4 fpn_output2-4"),
    ("hiervit", "p2", "p2", "fpn_output3-4 top_block.p5-6"),
]


def all_layers(text):
    """``a1-3 b`` is a1, a2, a3 and b."""
    for word in text.split():
        first, _, last = word.partition("-")
        numbers = range(int(first[-1]), int(last or first[-1]) + 1)
        yield from (f"{first[:-1]}{number}" for number in numbers)


@pytest.mark.parametrize(("name", "rpn", "heads", "unread"), READ)
def test_what_is_read_by_none_is_frozen(instant_cfg, name, rpn, heads, unread):
    maps = ["MODEL.RPN.IN_FEATURES", rpn.split(), "MODEL.ROI_HEADS.IN_FEATURES", heads.split()]
    sizes = ["MODEL.ANCHOR_GENERATOR.SIZES", [[16]], "MODEL.FPN.OUT_CHANNELS", 16]
    instant_cfg.merge_from_list([*ATTENTION[name], "MODEL.FPN.NORM", "", *maps, *sizes])
    detector = build_detector(instant_cfg)
    frozen = [n for n, p in detector.named_parameters() if not p.requires_grad]
    layers = {n.removeprefix("backbone.").rsplit(".", 1)[0].removesuffix(".conv") for n in frozen}
    assert layers == set(all_layers(unread))
    assert_all_is_trained(detector)


@pytest.mark.parametrize(
    ("freeze_at", "trained"),
    [
        (0, {"stem", "res2", "res3", "res4", "res5"}),
        (1, {"res2", "res3", "res4", "res5"}),
        (3, {"res4", "res5"}),
        (5, set()),
    ],
)
def test_freezing_stops_parameters_and_statistics(instant_cfg, freeze_at, trained):
    instant_cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    instant_cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    trunk = build_detector(instant_cfg).backbone.bottom_up
    assert {
        name.split(".")[0] for name, p in trunk.named_parameters() if p.requires_grad
    } == trained
    before = {k: v.clone() for k, v in trunk.state_dict().items() if "running_mean" in k}
    trunk.train()
    trunk(torch.randn(2, 3, 64, 64))
    after = trunk.state_dict()
    moved = {k.split(".")[0] for k, v in before.items() if not torch.equal(v, after[k])}
    assert moved == trained


def test_heads_may_grow_along_the_cascade(instant_cfg):
    instant_cfg.MODEL.CASCADE.BOX_HEAD.NUM_FC = (1, 2, 2)
    instant_cfg.MODEL.CASCADE.BOX_HEAD.FC_DIM = (16, 24, 40)
    heads = build_detector(instant_cfg).roi_heads.box_head
    assert [head.out_features for head in heads] == [16, 24, 40]
    assert [hasattr(head, "fc2") for head in heads] == [False, True, True]


def test_another_number_of_stages(instant_cfg):
    cascade = instant_cfg.MODEL.ROI_BOX_CASCADE_HEAD
    cascade.IOUS = (0.5, 0.55, 0.6, 0.65)
    cascade.BBOX_REG_WEIGHTS = tuple((w, w, w / 2, w / 2) for w in (10.0, 15.0, 20.0, 25.0))
    instant_cfg.MODEL.CASCADE.EXIT.THRESHOLDS = (0.9,)
    instant_cfg.MODEL.CASCADE.EXIT.PRUNE_THRESHOLDS = (0.01, 0.02, 0.03)
    head = build_detector(instant_cfg).roi_heads
    assert head.num_stages == len(head.box_head) == 4
    assert head.exits.thresholds == (0.9, 0.9, 0.9)


def test_a_contradiction_is_refused_before_anything_is_built(instant_cfg):
    instant_cfg.MODEL.CASCADE.EXIT.THRESHOLDS = (0.9, 0.9, 0.9)
    with pytest.raises(ConfigError, match=r"MODEL\.CASCADE\.EXIT\.THRESHOLDS"):
        build_detector(instant_cfg)
