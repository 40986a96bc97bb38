"""Detectors in 8 bits: their maps are nearly those of float32, and what cannot be stays."""

import copy
import json

import pytest
import torch
from torch import nn

from cascade_det.core import ExitPolicy
from cascade_det.engine import fast_types
from cascade_det.errors import ConfigError
from cascade_det.layers.int8 import Int8Conv2d, Int8Linear, multiplies_int8_exactly
from cascade_det.standalone import build_detector, evaluate, optimize, train

needs_int8 = pytest.mark.skipif(
    not multiplies_int8_exactly(), reason="this CPU does not multiply 8 bits exactly"
)
BN = ("MODEL.RESNETS.NORM", "BN")
RESNET = ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", *BN)
R18 = (*RESNET, "MODEL.RESNETS.DEPTH", "18", "MODEL.FPN.NORM", "BN")
R50 = (
    *(*RESNET, "MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "256"),
    *("MODEL.RPN.CONV_DIMS", "(48, -1)"),
)
GN = (*R18, "MODEL.FPN.NORM", "GN")
NECK = (
    "MODEL.BACKBONE.NAME",
    "build_resnet_cascade_fpn_backbone",
    *BN,
    *R18[4:6],
    "MODEL.FPN.NORM",
    "",
)
MOBILE = ()
ALL = {"backbone", "fpn", "rpn", "roi_heads"}


def make_detector(cfg, *options):
    cfg = cfg.clone()
    cfg.merge_from_list([*options, "MODEL.CASCADE.EXIT.ENABLED", "False"])
    torch.manual_seed(0)
    detector = build_detector(cfg).eval()
    for module in detector.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    return detector


def make_images(count=2):
    generator = torch.Generator().manual_seed(0)
    sizes = ((96, 128), (80, 100))
    return [
        [{"image": torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator)}]
        for size in sizes[:count]
    ]


def maps_and_logits(detector, batch):
    """What the pyramid and the first box head make of a batch."""
    with torch.no_grad():
        inputs = detector.cascade_inputs(batch)
        pyramid = detector.roi_heads.pyramid(inputs.features)
        box = torch.tensor([[8.0, 8, 72, 60]]), torch.zeros(1, dtype=torch.int64)
        crops = detector.roi_heads.pooler(pyramid, *box)
        return inputs.features, detector.roi_heads.box_head[0](crops)


def relative_error(got, expected):
    return ((got.float() - expected).norm() / expected.norm()).item()


def int8_types(fast):
    return (
        set(fast.dtype.split("int8: ")[1].split(";")[0].split(", "))
        if "int8" in fast.dtype
        else set()
    )


@needs_int8
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (R18, ALL),
        (R50, ALL),
        (NECK, ALL),
        (GN, ALL - {"fpn"}),
        (MOBILE, ALL - {"backbone"}),
    ],
    ids=["R-18", "R-50", "cascade_fpn", "GN", "mobilenet"],
)
def test_maps_are_nearly_those_of_float32(instant_cfg, options, parts):
    plain, images = make_detector(instant_cfg, *options), make_images()
    fast = optimize(copy.deepcopy(plain), dtype="int8", images=images)
    assert int8_types(fast) == parts
    convs = {name for name, m in fast.named_modules() if isinstance(m, Int8Conv2d)}
    assert any(name.startswith("proposal_generator.rpn_head.conv") for name in convs)
    assert any(".bottom_up." in name for name in convs) == ("backbone" in parts)
    assert any(".fpn_" in name for name in convs) == ("fpn" in parts)
    assert all(isinstance(h.layers[0], Int8Linear) for h in fast.roi_heads.box_head)
    # They read maps of 8 bits as they are, and round others themselves.
    assert not any(m._forward_pre_hooks for m in fast.modules() if isinstance(m, Int8Conv2d))
    for batch in images:
        expected, got = maps_and_logits(plain, batch), maps_and_logits(fast, batch)
        errors = [relative_error(g, e) for g, e in zip(got[0], expected[0], strict=True)]
        assert max(errors) < 0.08
        assert min(errors) > 1e-3  # of 8 bits indeed
        assert relative_error(got[1], expected[1]) < 0.15
    both = fast.detect([sample for batch in images for sample in batch]).detections
    assert len(both) == 2
    assert any("on the images that measured" in s.lower() for s in fast.optimizations)


@needs_int8
@pytest.mark.parametrize("parts", [("backbone",), ("fpn",), ("rpn", "roi_heads"), ("stem", "fpn")])
def test_parts_can_stay_float32(instant_cfg, parts):
    plain, images = make_detector(instant_cfg, *R18), make_images(1)
    fast = optimize(copy.deepcopy(plain), dtype="int8", float32_parts=parts, images=images)
    assert int8_types(fast) == ALL - set(parts)
    expected, got = maps_and_logits(plain, images[0]), maps_and_logits(fast, images[0])
    assert all(relative_error(g, e) < 0.08 for g, e in zip(got[0], expected[0], strict=True))
    assert fast.detect(images[0]).detections[0].boxes.dtype == torch.float32


@needs_int8
def test_auto_takes_8_bits_only_where_detections_agree(instant_cfg, monkeypatch):
    monkeypatch.setattr(fast_types, "MIN_DETECTIONS", 1)
    plain, images = make_detector(instant_cfg, *R18), make_images()
    for predictor in plain.roi_heads.box_predictor:
        nn.init.normal_(predictor.cls_score.weight, std=3.0)  # sure of itself
    for share, expected in ((1.1, set()), (0.0, ALL)):
        monkeypatch.setattr(fast_types, "MIN_SHARE", share)
        monkeypatch.setattr(fast_types, "MAX_SHIFT", 1000.0)
        # The options take the longer the later they are tried.
        monkeypatch.setattr(fast_types, "_time", lambda made, *_: {i: i for i in made})
        fast = optimize(copy.deepcopy(plain), images=images)
        assert int8_types(fast) == expected


@needs_int8
def test_heads_that_exits_keep_from_regions_are_measured_too(instant_cfg):
    detector = make_detector(instant_cfg)
    detector.set_exits(ExitPolicy(num_stages=3, thresholds=(0.0, 0.0)))
    images = make_images()
    assert detector.detect(images[0]).stats.entered[1] == 0
    fast = optimize(copy.deepcopy(detector), dtype="int8", images=images)
    fast.set_exits(None)
    detector.set_exits(None)
    with torch.no_grad():
        pyramid = detector.roi_heads.pyramid(detector.cascade_inputs(images[0]).features)
        box = torch.tensor([[8.0, 8, 72, 60]]), torch.zeros(1, dtype=torch.int64)
        crops = detector.roi_heads.pooler(pyramid, *box)
        for ours, theirs in zip(fast.roi_heads.box_head, detector.roi_heads.box_head, strict=True):
            assert relative_error(ours(crops), theirs(crops)) < 0.1


@needs_int8
def test_layers_in_8_bits_are_not_compiled(instant_cfg):
    for parts in ((), ("backbone",)):
        fast = optimize(
            make_detector(instant_cfg, *R18),
            dtype="int8",
            float32_parts=parts,
            images=make_images(1),
            compile=True,
        )
        assert any("Nothing is compiled" in sentence for sentence in fast.optimizations)
        assert len(fast.detect(make_images(1)[0]).detections) == 1


def test_without_exact_products_it_is_refused(instant_cfg, monkeypatch):
    monkeypatch.setattr(fast_types, "multiplies_int8_exactly", lambda: False)
    detector = make_detector(instant_cfg)
    with pytest.raises(ConfigError, match=r"clips sums .* no VNNI or AMX .* Give 'auto'"):
        optimize(detector, dtype="int8", images=make_images())
    assert detector.optimizations == []


@needs_int8
def test_without_images_it_is_refused(instant_cfg):
    for images in (None, []):
        with pytest.raises(ConfigError, match=r"FAST.IMAGES to a number, such as 32"):
            optimize(make_detector(instant_cfg), dtype="int8", images=images)


@needs_int8
def test_by_configuration(instant_cfg, tmp_path):
    instant_cfg.OUTPUT_DIR = str(tmp_path)
    train(instant_cfg)
    weights = [
        "MODEL.WEIGHTS",
        str(tmp_path / "model_final.pth"),
        "OUTPUT_DIR",
        str(tmp_path / "e"),
    ]
    fast = ["MODEL.CASCADE.FAST.ENABLED", "True", "MODEL.CASCADE.FAST.DTYPE", "int8"]
    instant_cfg.merge_from_list([*weights, *fast, "MODEL.CASCADE.FAST.IMAGES", "3"])
    evaluate(instant_cfg)
    results = json.loads((tmp_path / "e" / "results.json").read_text())
    assert "int8: fpn, rpn, roi_heads" in results["machine"]["dtype"]
