"""Presets on weights of three stages, in the host that is always there."""

import logging
from pathlib import Path

import pytest
import torch

from cascade_det.config import load_config
from cascade_det.engine.devices import device_name
from cascade_det.errors import CheckpointError
from cascade_det.standalone import Predictor, evaluate, train
from cascade_det.standalone.build import build_detector
from cascade_det.standalone.evaluate import load_detector
from cascade_det.weights.digest import weights_sha256

ROOT = Path(__file__).resolve().parents[2]
INSTANT = ROOT / "configs" / "quick_schedules" / "instant_test.yaml"
EXITS = ROOT / "configs" / "exits"
NODE = "MODEL.CASCADE.EXIT."


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Three stages as they are initialised, but for boxes that move and classes that differ."""
    torch.manual_seed(0)
    state = build_detector(load_config(INSTANT)).state_dict()
    for name, value in state.items():
        if "box_predictor" in name and name.endswith("weight"):
            value.copy_(torch.randn(value.shape) * 0.2)
    path = tmp_path_factory.mktemp("weights") / "three.pth"
    torch.save({"model": state}, path)
    return path


@pytest.fixture
def make_cfg(shape_options, weights, tmp_path):
    def make(*presets, options=()):
        files = [INSTANT, *(EXITS / f"{preset}.yaml" for preset in presets)]
        opts = [*shape_options, "OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", str(weights)]
        return load_config(files, [*opts, *options])

    return make


@pytest.fixture
def images():
    return [torch.randint(0, 256, (96, 128, 3), dtype=torch.uint8).numpy() for _ in range(2)]


def test_two_stages_of_three_are_the_cascade_that_stops_there(make_cfg, images):
    full = Predictor(make_cfg("throughput")).detector
    two = Predictor(make_cfg("mobile", options=[f"{NODE}ENABLED", "False"])).detector
    assert (full.cascade.num_stages, two.cascade.num_stages) == (3, 2)
    batch = [{"image": torch.from_numpy(image.transpose(2, 0, 1).copy())} for image in images]
    stopped = full.detect(batch, stages=True).stages[1].detections
    for ours, theirs in zip(two.detect(batch).detections, stopped, strict=True):
        assert len(ours)
        torch.testing.assert_close(ours.boxes, theirs.boxes)
        torch.testing.assert_close(ours.scores, theirs.scores)
        assert torch.equal(ours.classes, theirs.classes)


def test_mobile_says_what_it_is_and_what_it_leaves_out(make_cfg, images, caplog):
    with caplog.at_level(logging.INFO):
        predictor = Predictor(make_cfg("mobile"))
    assert "no place in this model, left out:\n    roi_heads.box_head.2 (" in caplog.text
    assert [r.getMessage() for r in caplog.records].count(
        "Exits: 2 stages, IoU 0.5, 0.6; background below 0.02; redundant from IoU 0.8; confident "
        "from max_prob 0.85 and refinement 0.9; at most 300, 100 of an image's regions in a stage"
    ) == 1
    assert len(predictor(images)) == 2


def test_four_stages_on_three_are_an_error_but_in_training(make_cfg, caplog):
    for use in (evaluate, Predictor):
        with pytest.raises(CheckpointError, match=r"has 3 stages .*IOUS has 4: train stage 3 "):
            use(make_cfg("cloud"))
    cfg = make_cfg("cloud", options=["SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()"])
    with caplog.at_level(logging.INFO):
        train(cfg)
    report = caplog.text.partition("not in the file, left as initialised:")[2]
    assert report.lstrip().startswith("roi_heads.box_head.3 (")
    assert caplog.text.count("Exits: 4 stages, IoU 0.5, 0.6, 0.7, 0.75; ") == 1
    trained = str(Path(cfg.OUTPUT_DIR, "model_final.pth"))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        detector, _ = load_detector(make_cfg("cloud", options=["MODEL.WEIGHTS", trained]))
    assert detector.cascade.num_stages == 4
    assert caplog.text.count("Exits: 4 stages, IoU 0.5, 0.6, 0.7, 0.75; ") == 1


def test_learned_exits_that_nobody_trained_are_an_error_but_in_training(make_cfg, caplog):
    options = [f"{NODE}ENABLED", "True", f"{NODE}LEARNED", "('gate',)", "SOLVER.MAX_ITER", "1"]
    cfg = make_cfg(options=[*options, "DATASETS.TEST", "()"])
    with pytest.raises(CheckpointError, match=r"learned exits gate .*FREEZE_DETECTOR"):
        Predictor(cfg)
    with caplog.at_level(logging.INFO):
        train(cfg)
    assert "roi_heads.exits (" in caplog.text
    cfg.MODEL.WEIGHTS = str(Path(cfg.OUTPUT_DIR, "model_final.pth"))
    Predictor(cfg)


@pytest.mark.parametrize("use", [load_detector, Predictor])
def test_thresholds_of_another_device_are_told(use, make_cfg, caplog):
    here = device_name("cpu")
    assert here

    def warnings(*options):
        caplog.clear()
        use(make_cfg(options=options))
        return [r.getMessage() for r in caplog.records if "DEVICE_NAME" in r.getMessage()]

    (told,) = warnings(f"{NODE}DEVICE_NAME", "Tesla K80")
    assert "'Tesla K80'" in told
    assert repr(here) in told
    assert warnings(f"{NODE}DEVICE_NAME", here) == warnings() == []
    assert warnings(f"{NODE}DEVICE_NAME", "Tesla K80", f"{NODE}ENABLED", "False") == []


@pytest.mark.parametrize("use", [load_detector, Predictor])
def test_exits_of_other_weights_are_told(use, make_cfg, weights, tmp_path, caplog):
    state = torch.load(weights)["model"]
    again, other = tmp_path / "again.pth", tmp_path / "other.pth"
    torch.save({"model": state, "iteration": 5}, again)
    torch.save({"model": {name: value + 1 for name, value in state.items()}}, other)
    calibrated = [f"{NODE}WEIGHTS_SHA256", weights_sha256(weights), f"{NODE}ENABLED"]

    def warnings(file, enabled="True"):
        caplog.clear()
        use(make_cfg(options=[*calibrated, enabled, "MODEL.WEIGHTS", str(file)]))
        return [r.getMessage() for r in caplog.records if "WEIGHTS_SHA256" in r.getMessage()]

    (told,) = warnings(other)
    assert weights_sha256(weights)[:12] in told
    assert str(other) in told
    assert weights_sha256(other)[:12] in told
    assert warnings(weights) == warnings(again) == warnings(other, "False") == []
