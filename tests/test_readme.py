"""What the README tells people to write works as it stands there."""

import ast
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from torchvision.models import get_weight, mobilenet_v2, mobilenet_v3_large, resnet18

from cascade_det.backbones.torchvision_weights import torchvision_address
from cascade_det.config import check_config, load_config
from cascade_det.standalone.build import build_detector
from cascade_det.weights.loading import load_weights

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
RECIPE = ROOT / "configs" / "quick_schedules" / "finetune_small.yaml"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml(text, tmp_path):
    file = tmp_path / "readme.yaml"
    file.write_text(text.replace("_BASE_: configs", f"_BASE_: {ROOT}/configs"))
    cfg = load_config(file)
    if "_BASE_" in yaml.safe_load(text):
        check_config(cfg)


@pytest.mark.parametrize("text", blocks("python"))
def test_python(text):
    ast.parse(text)


def test_files_that_are_named_are_there():
    named = set(
        re.findall(r"(?:configs|tools|datasets|docs)/[\w/.-]+\.(?:yaml|py|md|png|jpg)", TEXT)
    )
    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_recipe_and_the_table_have_weights_that_exist_and_their_normalisation():
    cfg = load_config(RECIPE)
    names = [*re.findall(r"torchvision://([\w.]+\w)`", TEXT), cfg.MODEL.WEIGHTS.split("//")[1]]
    assert len(names) >= 5
    for name in names:
        assert torchvision_address(name).startswith("https://download.pytorch.org/models/")
        expected = get_weight(name).transforms()
        np.testing.assert_allclose(np.array(expected.mean) * 255, cfg.MODEL.PIXEL_MEAN)
        np.testing.assert_allclose(np.array(expected.std) * 255, cfg.MODEL.PIXEL_STD)
    assert cfg.INPUT.FORMAT == "RGB"  # as Pillow, and so torchvision, reads images
    assert cfg.MODEL.BACKBONE.NAME == "build_mobilenet_v2_fpn_backbone"
    assert cfg.MODEL.WEIGHTS.startswith("torchvision://MobileNet_V2_Weights.")


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (mobilenet_v2, []),
        (mobilenet_v3_large, ["MODEL.BACKBONE.NAME", "build_mobilenet_v3_large_fpn_backbone"]),
        (
            resnet18,
            [
                *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.RESNETS.DEPTH", "18"),
                *("MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.RESNETS.STRIDE_IN_1X1", "False"),
            ],
        ),
    ],
)
def test_trunks_of_the_table_take_torchvisions_weights_whole(model, options, tmp_path):
    torch.save(model().state_dict(), tmp_path / "published.pth")
    cfg = load_config(RECIPE, [*options, "MODEL.DEVICE", "cpu"])
    check_config(cfg)
    detector = build_detector(cfg)
    names = [
        f"backbone.bottom_up.{name}" for name, _ in detector.backbone.bottom_up.named_buffers()
    ]
    names += [f"backbone.bottom_up.{n}" for n, _ in detector.backbone.bottom_up.named_parameters()]
    loaded = load_weights(detector, tmp_path / "published.pth").loaded
    assert {name for name in names if "num_batches" not in name} <= set(loaded)


def test_the_example_of_prediction_runs(tmp_path, monkeypatch, capsys):
    """On a small detector of random weights, whose boxes all count."""
    base = ROOT / "configs" / "quick_schedules" / "instant_test.yaml"
    (tmp_path / "cells.yaml").write_text(
        f"_BASE_: {base}\nMODEL: {{ROI_HEADS: {{NUM_CLASSES: 2, SCORE_THRESH_TEST: 0.0}}}}\n"
    )
    detector = build_detector(load_config(tmp_path / "cells.yaml"))
    run = {"class_names": ["red cell", "white cell"], "category_ids": [1, 2]}
    weights = tmp_path / "output" / "cells" / "model_final.pth"
    weights.parent.mkdir(parents=True)
    torch.save({"model": detector.state_dict(), "run": run}, weights)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "a.jpg"), pixels)
    monkeypatch.chdir(tmp_path)
    [example] = [text for text in blocks("python") if "draw_detections" in text]
    exec(compile(example.replace("threshold=0.5", "threshold=0.0"), "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(re.fullmatch(r"(red|white) cell 0\.\d\d \[.*\]", line) for line in lines)
    drawn = cv2.imread("a_detected.png")
    assert drawn.shape == (60, 80, 3)
    assert (drawn != cv2.imread("a.jpg")).any()
