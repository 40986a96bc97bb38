"""The exit presets of ``configs/exits`` on weights of three stages."""

import logging
from pathlib import Path

import pytest
import torch
from shape_runs import INSTANT, ROOT

from cascade_det.engine.devices import device_name
from cascade_det.errors import CheckpointError
from cascade_det.standalone import Predictor
from cascade_det.weights import read_weights_file, weights_sha256

NODE = "MODEL.CASCADE.EXIT."
ONE = ("SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()")
LEARNED = (f"{NODE}ENABLED", "True", f"{NODE}LEARNED", "('gate',)")


@pytest.fixture(scope="module")
def weights(host, build_model, tmp_path_factory):
    """Initial weights of three stages, except for box predictors that tell classes apart."""
    torch.manual_seed(0)
    state = build_model(host.load_config(INSTANT)).state_dict()
    for name, value in state.items():
        if "box_predictor" in name and name.endswith("weight"):
            value.copy_(torch.randn(value.shape) * 0.2)
    path = tmp_path_factory.mktemp("weights") / "three.pth"
    torch.save({"model": state}, path)
    return path


@pytest.fixture
def make_preset(make_cfg, weights):
    """``make_preset(*presets, more=options)``: a configuration with these weights."""

    def make(*presets, more=()):
        files = [str(ROOT / "configs" / "exits" / f"{preset}.yaml") for preset in presets]
        return make_cfg("MODEL.WEIGHTS", str(weights), *more, files=files)

    return make


@pytest.fixture
def messages(caplog):
    """``messages()``: what the package has logged since the last call."""

    def take():
        found = [r.getMessage() for r in caplog.records if r.name.startswith("cascade_det")]
        caplog.clear()
        return found

    with caplog.at_level(logging.INFO, "cascade_det"):
        yield take


@pytest.fixture(params=["open_detector", "Predictor"])
def open_weights(request, host):
    """Opens the detector of a configuration, with its weights."""
    if request.param == "open_detector":
        return lambda cfg: host.open_detector(cfg)[0]
    if host.name == "detectron2":
        pytest.skip("the predictor is of the standalone host")
    return lambda cfg: Predictor(cfg).detector


def test_two_stages_of_three_are_the_cascade_that_stops_there(make_preset, open_weights, messages):
    full = open_weights(make_preset("throughput"))
    assert "Exits: off" in messages()
    open_weights(make_preset("mobile"))
    told = messages()
    assert any("left out:\n    roi_heads.box_head.2 (" in message for message in told)
    assert [message for message in told if message.startswith("Exits")] == [
        "Exits: 2 stages, IoU 0.5, 0.6; background below 0.02; redundant from IoU 0.8; confident "
        "from max_prob 0.85 and refinement 0.9; at most 300, 100 of an image's regions in a stage"
    ]
    two = open_weights(make_preset("mobile", more=[f"{NODE}ENABLED", "False"]))
    assert (full.cascade.num_stages, two.cascade.num_stages) == (3, 2)
    batch = [{"image": torch.randint(256, (3, 96, 128), dtype=torch.uint8)} for _ in range(2)]
    stopped = full.detect(batch, stages=True).stages[1].detections
    for ours, theirs in zip(two.detect(batch).detections, stopped, strict=True):
        assert len(ours)
        torch.testing.assert_close(ours.boxes, theirs.boxes)
        torch.testing.assert_close(ours.scores, theirs.scores)
        assert torch.equal(ours.classes, theirs.classes)


def test_four_stages_on_three_are_an_error_except_in_training(
    host, make_preset, open_weights, messages
):
    for use in (host.evaluate, open_weights):
        with pytest.raises(CheckpointError, match=r"has 3 stages .*IOUS has 4: train stage 3 "):
            use(make_preset("cloud"))
    messages()
    cfg = make_preset("cloud", more=ONE)
    host.train(cfg)
    told = messages()
    assert any("left as initialised:\n    roi_heads.box_head.3 (" in message for message in told)
    summary = "Exits: 4 stages, IoU 0.5, 0.6, 0.7, 0.75; "
    assert sum(message.startswith(summary) for message in told) == 1
    trained = str(Path(cfg.OUTPUT_DIR, "model_final.pth"))
    detector = open_weights(make_preset("cloud", more=["MODEL.WEIGHTS", trained]))
    assert detector.cascade.num_stages == 4
    assert sum(message.startswith(summary) for message in messages()) == 1


def test_untrained_learned_exits_are_an_error_except_in_training(
    host, make_preset, open_weights, messages
):
    with pytest.raises(CheckpointError, match=r"learned exits gate .*FREEZE_DETECTOR"):
        open_weights(make_preset(more=LEARNED))
    cfg = make_preset(more=[*LEARNED, *ONE])
    host.train(cfg)
    assert any("roi_heads.exits (" in message for message in messages())
    trained = str(Path(cfg.OUTPUT_DIR, "model_final.pth"))
    open_weights(make_preset(more=[*LEARNED, "MODEL.WEIGHTS", trained]))


def test_thresholds_of_another_device_are_warned_of(make_preset, open_weights, messages):
    here = device_name("cpu")
    assert here

    def warnings(*more):
        messages()
        open_weights(make_preset(more=more))
        return [message for message in messages() if "DEVICE_NAME" in message]

    (told,) = warnings(f"{NODE}DEVICE_NAME", "Tesla K80")
    assert "'Tesla K80'" in told
    assert repr(here) in told
    assert warnings(f"{NODE}DEVICE_NAME", here) == warnings() == []
    assert warnings(f"{NODE}DEVICE_NAME", "Tesla K80", f"{NODE}ENABLED", "False") == []


def test_exits_of_other_weights_are_warned_of(
    make_preset, open_weights, weights, tmp_path, messages
):
    state = torch.load(weights)["model"]
    again, other = tmp_path / "again.pth", tmp_path / "other.pth"
    torch.save({"model": state, "iteration": 5}, again)
    torch.save({"model": {name: value + 1 for name, value in state.items()}}, other)
    sha256 = weights_sha256(read_weights_file(weights).weights)
    calibrated = [f"{NODE}WEIGHTS_SHA256", sha256, f"{NODE}ENABLED"]

    def warnings(file, enabled="True"):
        messages()
        open_weights(make_preset(more=[*calibrated, enabled, "MODEL.WEIGHTS", str(file)]))
        return [message for message in messages() if "WEIGHTS_SHA256" in message]

    (told,) = warnings(other)
    assert weights_sha256(read_weights_file(weights).weights)[:12] in told
    assert str(other) in told
    assert weights_sha256(read_weights_file(other).weights)[:12] in told
    assert warnings(weights) == warnings(again) == warnings(other, "False") == []
