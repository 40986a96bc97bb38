"""Optimised detectors: the same detections, in other types where that is asked for."""

import copy
import logging

import cv2
import pytest
import torch
from small_backbones import ATTENTION, CASCADE_FPN
from small_cascades import assert_same_detections
from torch import nn

from cascade_det.backbones.decoder_blocks import UpConv
from cascade_det.backbones.fast_upconv import FastUpConv
from cascade_det.backbones.relative_bias import RelativeBias
from cascade_det.benchmark.agreement import compare_detections
from cascade_det.config.cascade_keys import FAST_PARTS as PARTS
from cascade_det.core.fast_heads import FastBoxHead
from cascade_det.engine import devices
from cascade_det.engine.head_flops import region_flops
from cascade_det.errors import ConfigError
from cascade_det.layers.winograd import WinogradConv2d
from cascade_det.standalone import Predictor, build_detector, optimize
from cascade_det.standalone.host import open_detector

MOBILE = ()
R18 = (
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.RESNETS.DEPTH", "18"),
    *("MODEL.FPN.NORM", "GN", "MODEL.RPN.CONV_DIMS", "(48, -1)"),
)
CONV_HEADS = ("MODEL.CASCADE.BOX_HEAD.NUM_CONV", "(1, 0, 0)")
EXITS_OFF = ("MODEL.CASCADE.EXIT.ENABLED", "False")
FAST = ("MODEL.CASCADE.FAST.ENABLED", "True")
FLOAT32 = ("MODEL.CASCADE.FAST.DTYPE", "float32")


def make_detector(cfg, *options):
    cfg = cfg.clone()
    cfg.merge_from_list([*options, *EXITS_OFF, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.01"])
    torch.manual_seed(0)
    detector = build_detector(cfg).eval()
    for module in detector.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.8, 1.2)  # where it is 0, its branch is silent
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
        if isinstance(module, RelativeBias):
            nn.init.normal_(module.attention_biases)
    for predictor in detector.roi_heads.box_predictor:
        nn.init.normal_(predictor.cls_score.weight, std=0.3)
    return detector


def make_batch():
    sizes = ((96, 128), (80, 100))
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in sizes]
    return [{"image": image} for image in images]


DECODERS = {name: CASCADE_FPN[name] for name in ("resnet_cascade", "hiervit_cascade")}
SAME = {"mobilenet": MOBILE, "R-18": R18, "convs": CONV_HEADS, **ATTENTION, **DECODERS}


@pytest.mark.parametrize("name", SAME)
def test_float32_gives_the_same_detections(instant_cfg, name):
    plain = make_detector(instant_cfg, *SAME[name])
    fast = optimize(copy.deepcopy(plain), dtype="float32")
    batch = make_batch()
    expected = plain.detect(batch, stages=True)
    got = fast.detect(batch, stages=True)
    assert sum(len(d.boxes) for d in expected.detections) > 20
    assert_same_detections(got.detections, expected.detections)
    for ours, theirs in zip(got.stages, expected.stages, strict=True):
        assert_same_detections(ours.detections, theirs.detections)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fast.modules())
    upsampling = [m for m in fast.modules() if isinstance(m, UpConv)]
    assert all(isinstance(m, FastUpConv) for m in upsampling)
    assert bool(upsampling) == (name in DECODERS)


@pytest.mark.parametrize("options", [MOBILE, R18], ids=["mobilenet", "R-18"])
def test_maps_are_pooled_where_they_were_made(instant_cfg, options):
    fast = optimize(make_detector(instant_cfg, *options), dtype="float32")
    with torch.inference_mode():
        features = fast.cascade_inputs(make_batch()).features
        table = fast.roi_heads.pooler.prepare(features).table
    assert table.data_ptr() == features[0].data_ptr()


def test_wide_convolutions_are_winograds(instant_cfg):
    fast = optimize(make_detector(instant_cfg, "MODEL.FPN.OUT_CHANNELS", "256"), dtype="float32")
    count = sum(isinstance(m, WinogradConv2d) for m in fast.modules())
    assert count == 5  # four outputs of the pyramid and the head of the RPN
    assert any(sentence.startswith("5 convolutions") for sentence in fast.optimizations)
    half = optimize(make_detector(instant_cfg, "MODEL.FPN.OUT_CHANNELS", "256"), dtype="bfloat16")
    assert not any(isinstance(m, WinogradConv2d) for m in half.modules())


MASKS = ("MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32")


@pytest.mark.parametrize("stages", ["last", "every"])
@pytest.mark.parametrize("parts", [(), ("roi_heads",)])
def test_masks_are_as_before(instant_cfg, stages, parts):
    options = (*MASKS, "MODEL.CASCADE.MASK.STAGES", stages)
    plain = make_detector(instant_cfg, *options)
    for head in plain.roi_heads.masks.heads:
        nn.init.normal_(head.predictor.weight, std=1.0)
    dtype = "bfloat16" if parts else "float32"
    fast = optimize(copy.deepcopy(plain), dtype=dtype, float32_parts=parts)
    heads = fast.roi_heads.masks.heads
    assert len(heads) == (3 if stages == "every" else 1)
    assert {head.dtype for head in heads} == {torch.float32}
    assert any(f"{len(heads)} of {len(heads)} mask heads" in s for s in fast.optimizations)
    batch = make_batch()
    expected, got = plain.detect(batch), fast.detect(batch)
    if parts:  # the maps before are rounded
        assert all(ours.masks.dtype == torch.float32 for ours in got.detections)
        return
    assert_same_detections(got.detections, expected.detections)
    for ours, theirs in zip(got.detections, expected.detections, strict=True):
        torch.testing.assert_close(ours.masks, theirs.masks, rtol=0, atol=1e-4)
        assert theirs.masks.std() > 0.05


def types_of(detector):
    """The types that the parts compute in, seen at their outputs."""
    body, seen = detector.backbone.bottom_up, {}
    modules = {
        "stem": body.features[0],
        "backbone": body.features[-1],
        "fpn": detector.backbone.get_submodule("fpn_output2"),
        "rpn": detector.proposal_generator.rpn_head.convs[0],
        "roi_heads": detector.roi_heads.box_head[0].layers[0],
    }
    for name, module in modules.items():
        module.register_forward_hook(lambda _, x, y, name=name: seen.update({name: y.dtype}))
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    output = detector.detect([{"image": image}])
    assert all(d.boxes.dtype == d.scores.dtype == torch.float32 for d in output.detections)
    return {name for name, dtype in seen.items() if dtype == torch.float32}


@pytest.mark.parametrize("parts", [(), ("stem", "fpn", "roi_heads"), ("backbone", "rpn"), PARTS])
def test_parts_have_the_types_that_are_asked_for(instant_cfg, parts):
    fast = optimize(make_detector(instant_cfg), dtype="bfloat16", float32_parts=parts)
    assert types_of(fast) == set(parts)
    sentence = next(s for s in fast.optimizations if s.startswith("Computes in"))
    if len(parts) in (0, len(PARTS)):
        assert fast.dtype == ("float32" if parts else "bfloat16")
    else:
        assert fast.dtype in sentence
        assert f"float32: {', '.join(parts)}" in sentence


CROSSING = [(), ("stem",), ("backbone",), ("fpn",), ("stem", "fpn"), ("stem", "backbone")]


@pytest.mark.parametrize("name", ["efficientvit", "hiervit"])
def test_types_may_differ_between_stem_stages_and_pyramid(instant_cfg, name):
    """The pyramid of EfficientViT also takes a map of the stem."""
    plain = make_detector(instant_cfg, *ATTENTION[name])
    batch = [{"image": torch.randint(256, (3, 64, 64), dtype=torch.uint8)}]
    wanted = plain.cascade_inputs(batch).features
    for parts in CROSSING:
        fast = optimize(copy.deepcopy(plain), dtype="bfloat16", float32_parts=parts)
        stem, stages = fast.backbone.bottom_up.stem_and_stages()
        layers = {"stem": [stem], "backbone": stages, "fpn": [fast.backbone.fpn_output3]}
        for part, modules in layers.items():
            types = {p.dtype for module in modules for p in module.parameters()}
            assert types == {torch.float32 if part in parts else torch.bfloat16}, (part, parts)
        for ours, theirs in zip(fast.cascade_inputs(batch).features, wanted, strict=True):
            assert (ours.float() - theirs).norm() < 0.1 * theirs.norm(), parts
        assert len(fast.detect(batch).detections) == 1


def test_attention_is_optimised_and_said_to_be(instant_cfg):
    fast = optimize(make_detector(instant_cfg, *ATTENTION["efficientvit"]), dtype="float32")
    # One attention in each of 1 + 2 + 3 blocks.
    assert "The biases of 6 attentions are gathered." in fast.optimizations
    others = optimize(make_detector(instant_cfg), dtype="float32")
    assert not any("attentions" in sentence for sentence in others.optimizations)


def test_bfloat16_detects_nearly_the_same(instant_cfg):
    plain = make_detector(instant_cfg)
    batch = make_batch()
    inputs = plain.cascade_inputs(batch)
    fast = optimize(copy.deepcopy(plain), dtype="bfloat16")
    for ours, theirs in zip(fast.cascade_inputs(batch).features, inputs.features, strict=True):
        error = (ours.float() - theirs).norm() / theirs.norm()
        assert 0 < error < 0.05


@pytest.mark.parametrize("float32_parts", [(), ("rpn",), ("fpn", "rpn")])
def test_heads_with_convolutions_take_maps_of_another_type(instant_cfg, float32_parts):
    detector = make_detector(instant_cfg, *CONV_HEADS)
    fast = optimize(detector, dtype="bfloat16", float32_parts=float32_parts)
    assert [isinstance(h, FastBoxHead) for h in fast.roi_heads.box_head] == [False, True, True]
    kinds = dict(kind.split(": ") for kind in fast.dtype.split("; "))
    assert all("roi_heads" in kinds[kind] for kind in ("bfloat16", "float32"))
    assert len(fast.detect(make_batch()).detections) == 2


@pytest.mark.slow
def test_what_was_done_is_said(instant_cfg, caplog):
    with caplog.at_level(logging.INFO, "cascade_det.engine.optimization"):
        fast = optimize(make_detector(instant_cfg), compile=True)
    assert all(sentence in caplog.text for sentence in fast.optimizations)
    norms = make_detector(instant_cfg)
    count = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in norms.modules())
    assert f"{count} norms are folded into convolutions." in fast.optimizations


def test_the_type_is_chosen_by_the_device(instant_cfg, monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: True)
    assert devices.resolve_fast_dtype("auto", cpu) == torch.bfloat16
    assert devices.resolve_fast_dtype("auto", gpu) == torch.bfloat16
    assert optimize(make_detector(instant_cfg)).backbone.fpn_output2.weight.dtype == torch.bfloat16
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: False)
    assert devices.resolve_fast_dtype("auto", cpu) == torch.float32
    assert devices.resolve_fast_dtype("auto", gpu) == torch.float16
    assert optimize(make_detector(instant_cfg)).backbone.fpn_output2.weight.dtype == torch.float32


class TestTypesByMeasurement:
    """What decides is in tests/engine/test_fast_types.py; here are real detectors."""

    @pytest.fixture(autouse=True)
    def bfloat16(self, monkeypatch):
        monkeypatch.setattr(devices, "has_bfloat16", lambda device: True)

    def test_trunks_that_change_detections_stay_float32(self, instant_cfg):
        fast = optimize(make_detector(instant_cfg))
        assert types_of(fast) == {"stem", "backbone"}
        assert any("change noticeably in bfloat16" in sentence for sentence in fast.optimizations)
        for detector, more in (
            (make_detector(instant_cfg), {"dtype": "bfloat16"}),
            (make_detector(instant_cfg, *R18), {}),
        ):
            fast = optimize(detector, **more)
            assert fast.dtype == "bfloat16"
            assert not any("change noticeably" in sentence for sentence in fast.optimizations)

    def test_images_choose(self, instant_cfg, caplog, monkeypatch):
        monkeypatch.setattr("cascade_det.engine.fast_types.MIN_DETECTIONS", 10)
        plain = make_detector(instant_cfg)
        for predictor in plain.roi_heads.box_predictor:
            nn.init.normal_(predictor.cls_score.weight, std=3.0)  # sure of itself
        images = [make_batch(), make_batch()]
        wanted = plain.detect(images[0])
        with caplog.at_level(logging.INFO, "cascade_det.engine.optimization"):
            fast = optimize(copy.deepcopy(plain), dtype="bfloat16", images=images)
        tried = [s for s in fast.optimizations if "detections again" in s]
        assert len(tried) == 4
        assert all(sentence in caplog.text for sentence in tried)
        (chosen,) = (s for s in tried if s.endswith("chosen."))
        assert chosen.startswith(f"{fast.dtype}: finds")
        again = optimize(copy.deepcopy(plain), dtype="bfloat16", float32_parts=types_of(fast))
        assert_same_detections(
            fast.detect(images[0]).detections, again.detect(images[0]).detections
        )
        assert_same_detections(plain.detect(images[0]).detections, wanted.detections)

    def test_float32_leaves_nothing_to_choose(self, instant_cfg):
        fast = optimize(make_detector(instant_cfg), dtype="float32", images=[make_batch()])
        assert fast.dtype == "float32"
        assert any("no types to choose" in sentence for sentence in fast.optimizations)


class TestErrors:
    def test_training(self, instant_cfg):
        fast = optimize(make_detector(instant_cfg))
        with pytest.raises(RuntimeError, match="cannot be trained"):
            fast.losses(make_batch())

    def test_twice(self, instant_cfg):
        fast = optimize(make_detector(instant_cfg))
        with pytest.raises(ValueError, match="optimised already"):
            optimize(fast)

    def test_unknown_part(self, instant_cfg):
        with pytest.raises(ValueError, match=r"unknown parts \['neck'\]; known: stem"):
            optimize(make_detector(instant_cfg), float32_parts=("neck",))

    def test_float16_on_a_cpu_leaves_the_detector_as_it_is(self, instant_cfg):
        detector = make_detector(instant_cfg)
        with pytest.raises(ConfigError, match="for GPUs"):
            optimize(detector, dtype="float16")
        assert detector.optimizations == []


class TestByConfiguration:
    @pytest.fixture
    def cfg(self, instant_cfg, tmp_path):
        path = tmp_path / "weights.pth"
        torch.save({"model": make_detector(instant_cfg).state_dict()}, path)
        instant_cfg.merge_from_list(
            ["MODEL.WEIGHTS", str(path), "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.01", *EXITS_OFF]
        )
        return instant_cfg

    def test_the_predictor_is_fast_and_finds_the_same(self, cfg, shapes):
        paths = sorted(map(str, (shapes / "train").iterdir()))[:3]
        images = [*paths, *map(cv2.imread, paths)]
        plain = Predictor(cfg)
        expected = [plain(image) for image in images]
        cfg.merge_from_list([*FAST, *FLOAT32, "CASCADE.TEST_IMS_PER_BATCH", "2"])
        predictor = Predictor(cfg)
        assert predictor.detector.optimizations
        # Reading ahead changes nothing, whatever is read.
        assert_same_detections(predictor(images), expected)

    def test_on_a_device_with_bfloat16_the_predictor_finds_nearly_the_same(self, cfg, shapes):
        if not devices.has_bfloat16(torch.device("cpu")):
            pytest.skip("this CPU has no instructions for bfloat16")
        images = sorted(map(str, (shapes / "train").iterdir()))[:6]
        expected = Predictor(cfg)(images)
        cfg.merge_from_list(FAST)
        predictor = Predictor(cfg)
        assert any("bfloat16" in sentence for sentence in predictor.detector.optimizations)
        agreement = compare_detections(predictor(images), expected)
        # NMS among boxes of untrained weights flips for many of them.
        assert agreement["in_common"] > 0.5 * agreement["of_the_other"] > 20
        assert 0 < agreement["score_difference"] < 0.05

    def test_a_backbone_with_attention_is_opened_fast(self, instant_cfg, tmp_path):
        path = tmp_path / "weights.pth"
        plain = make_detector(instant_cfg, *ATTENTION["hiervit"])
        torch.save({"model": plain.state_dict()}, path)
        instant_cfg.merge_from_list([*ATTENTION["hiervit"], *EXITS_OFF, *FAST, *FLOAT32])
        instant_cfg.merge_from_list(["MODEL.WEIGHTS", str(path)])
        instant_cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.01
        fast, _, _ = open_detector(instant_cfg)
        assert any("attentions" in sentence for sentence in fast.optimizations)
        batch = make_batch()
        assert_same_detections(fast.detect(batch).detections, plain.detect(batch).detections)

    def test_evaluation_and_calibration_get_the_fast_detector(self, cfg):
        plain, _, _ = open_detector(cfg)
        cfg.merge_from_list(FAST)
        fast, _, _ = open_detector(cfg)
        assert fast.optimizations
        assert plain.dtype == "float32"
        flops = [region_flops(d.roi_heads, d.backbone.out_channels) for d in (plain, fast)]
        assert flops[0] == flops[1]
