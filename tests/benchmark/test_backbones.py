"""Trunks with their necks: what is compared, its sizes, and the ratios of its times."""

import json
import pickle

import pytest
import torch
from torch import nn

from cascade_det import config
from cascade_det.benchmark import backbones
from cascade_det.benchmark.backbones import (
    PEER,
    REFERENCE,
    measure_backbones,
    open_backbones,
    open_setups,
)
from cascade_det.benchmark.report import format_benchmark
from cascade_det.benchmark.run import run_benchmark
from cascade_det.model_zoo import get_config_file

M0 = (
    *("MODEL.BACKBONE.NAME", "build_efficientvit_fpn_backbone", "MODEL.EFFICIENTVIT.NAME", "m0"),
    *("MODEL.FPN.IN_FEATURES", "('res2', 'res3', 'res4', 'res5', 'res6')"),
)
SMALL = ("MODEL.ROI_BOX_HEAD.FC_DIM", "32")
_SHIPPED = backbones.REFERENCE_RECIPE, backbones.RECIPES
KINDS = (REFERENCE, "EfficientViT-M0")


@pytest.fixture(scope="module", autouse=True)
def _small():
    """ResNet-18 in place of ResNet-50, and one other trunk; without Detectron2 and bfloat16."""
    demo = "quick_schedules/demo.yaml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "REFERENCE_RECIPE", (demo, SMALL))
        patch.setattr(backbones, "RECIPES", {KINDS[1]: (demo, (*SMALL, *M0))})
        patch.setattr(backbones, "has_bfloat16", lambda device: False)
        patch.setattr(backbones, "why_no_detectron2", lambda: "not today")
        yield


@pytest.fixture(scope="module")
def trained():
    """Training steps are run here, not in a process of their own; their detectors."""
    built, build = [], backbones.build_detector

    def building(cfg):
        built.append(build(cfg))
        return built[-1]

    def here(build, **options):
        pickle.loads(pickle.dumps(build))()()
        return {"total": 9_000_000, "above_model": 1_000_000 * len(built)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "build_detector", building)
        patch.setattr(backbones, "peak_memory", here)
        yield built


@pytest.fixture(scope="module")
def done(make_options, trained, tmp_path_factory):
    """The results of a run on two images, which need no other model, and its folder."""
    output = tmp_path_factory.mktemp("backbones")
    weights = ("MODEL.WEIGHTS", "nowhere.pth")
    options = make_options(*weights, batches=(2,), measure=("backbones",), output=output)
    return run_benchmark(options), output


def norms(module):
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_optimised_backbones_have_no_norms_and_make_the_same_maps(make_options, monkeypatch):
    monkeypatch.setattr(backbones, "has_bfloat16", lambda device: True)
    left_out = {}
    found = open_backbones(open_setups(make_options()), left_out)
    assert left_out == {PEER: "not today"}
    settings = ("plain", "optimised", "bfloat16")
    assert [b.name for b in found] == [f"{kind}, {s}" for s in settings for kind in KINDS]
    for plain, fast, half in zip(found[:2], found[2:4], found[4:], strict=True):
        assert norms(plain.module)
        assert not norms(fast.module)
        assert not norms(half.module)
        assert (plain.keeps_memory, fast.keeps_memory) == (False, True)
        assert fast.inputs[1].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(fast.inputs[1], plain.inputs[1])
        maps, rounded = plain.run(1), half.run(1)
        for name, x in fast.run(1).items():
            torch.testing.assert_close(x, maps[name], rtol=1e-3, atol=1e-4)
            assert rounded[name].dtype == torch.bfloat16
            assert (rounded[name] - maps[name]).norm() < 0.3 * maps[name].norm()


def test_ratios_are_of_the_same_setting_in_the_same_round(done):
    [found] = done[0]["backbones"]
    assert set(done[0]["left_out"]) == {PEER, "backbones in bfloat16"}
    for comparison, settings in ((found, ("plain", "optimised")), (found["whole"], ("optimised",))):
        contenders = comparison["contenders"]
        assert list(contenders) == [f"{kind}, {s}" for s in settings for kind in KINDS]
        times = {name: row["ms_per_image"]["samples"] for name, row in contenders.items()}
        assert len(comparison["ratios"]) == len(settings)
        for entry, setting in zip(comparison["ratios"], settings, strict=True):
            pair = (f"{KINDS[1]}, {setting}", f"{REFERENCE}, {setting}")
            assert (entry["what"], entry["against"]) == pair
            wanted = [b / own for own, b in zip(*(times[name] for name in pair), strict=True)]
            assert entry["ratio"]["samples"] == pytest.approx(wanted)
    for whole in found["whole"]["contenders"].values():
        assert (whole["arrived"], whole["entered"]) == (40, [20, 10, 3])


def test_sizes(done, trained):
    [found] = done[0]["backbones"]
    resnet, vit = (found["contenders"][f"{kind}, plain"] for kind in KINDS)
    assert (resnet["input"], vit["input"]) == ([64, 96], [64, 128])
    assert [row["training_memory"] for row in (resnet, vit)] == [1_000_000, 2_000_000]
    assert resnet["multiply_adds"] == multiply_adds(trained[0].backbone, torch.zeros(1, 3, 64, 96))
    for row, detector in zip((resnet, vit), trained, strict=True):
        parameters = list(detector.backbone.parameters())
        assert row["parameters"] == sum(map(torch.numel, parameters))
        assert all(p.grad is not None for p in parameters if p.requires_grad)
        assert all(p.grad is None for p in detector.roi_heads.parameters())


def multiply_adds(module, images):
    """Of convolutions: inputs of a kernel for every output."""
    counts = []
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            conv.register_forward_hook(
                lambda conv, _, out: counts.append(out.numel() * conv.weight[0].numel())
            )
    with torch.no_grad():
        module.eval()(images)
    return sum(counts)


def test_a_configuration_with_another_backbone_is_compared_alone(make_options):
    assert tuple(open_setups(make_options())) == KINDS
    setups = open_setups(make_options(*M0, "MODEL.WEIGHTS", "nowhere.pth", "MODEL.MASK_ON", "True"))
    assert list(setups) == [REFERENCE, "build_efficientvit_fpn_backbone"]
    for setup in setups.values():
        assert not setup.trained
        assert not setup.cfg.MODEL.MASK_ON


def test_the_default_recipes_are_those_they_are_called(make_options, monkeypatch):
    monkeypatch.setattr(backbones, "REFERENCE_RECIPE", _SHIPPED[0])
    monkeypatch.setattr(backbones, "RECIPES", _SHIPPED[1])
    setups = open_setups(make_options(config_file=(get_config_file("Base-Cascade-RCNN-FPN.yaml"),)))
    trunks = {}
    for kind, setup in setups.items():
        arguments = config.backbone_arguments(setup.cfg)
        bottom_up = arguments["bottom_up"]
        trunks[kind] = arguments["name"], bottom_up.get("name", bottom_up.get("depth"))
    assert trunks == {
        REFERENCE: ("resnet", 50),
        "EfficientViT-M4": ("efficientvit", "m4"),
        "EfficientViT-M0": ("efficientvit", "m0"),
        "HAT-Net tiny": ("hatnet", "tiny"),
        "HierViT": ("hiervit", None),
        "MobileNetV2": ("mobilenet_v2", None),
    }


def test_the_run_builds_nothing_else_and_writes_tables(done):
    results, output = done
    assert results["contenders"] == {}
    assert results["left_out"][PEER] == "not today"
    assert json.loads((output / "benchmark.json").read_text())["backbones"]
    text = format_benchmark(results)
    assert "Trunk and neck: batch of 2" in text
    assert "Whole model, optimised, with exits: batch of 2, 40 proposals" in text
    [row] = [line for line in text.splitlines() if line.startswith(f"| {KINDS[1]}, plain ")]
    [found] = results["backbones"]
    parameters = found["contenders"][f"{KINDS[1]}, plain"]["parameters"]
    assert f"| {parameters / 1e6:.1f} " in " ".join(row.split())


@pytest.mark.needs_detectron2
@pytest.mark.usefixtures("trained")
def test_detectron2_makes_the_same_maps(make_options, monkeypatch):
    pytest.importorskip("detectron2.engine", exc_type=ImportError)
    monkeypatch.setattr(backbones, "why_no_detectron2", lambda: "")
    [found] = measure_backbones(make_options(), {})
    peer = found["contenders"][f"{PEER}, plain"]
    assert peer["difference"] < 1e-5
    assert f"{PEER}, plain" in [entry["what"] for entry in found["ratios"]]
