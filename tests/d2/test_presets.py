"""Presets on weights of three stages, inside Detectron2."""

import logging
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.modeling import build_model

from cascade_det.d2 import host
from cascade_det.d2.evaluate import load_model
from cascade_det.errors import CheckpointError
from cascade_det.weights.digest import weights_sha256

pytestmark = pytest.mark.needs_detectron2

ROOT = Path(__file__).resolve().parents[2]
INSTANT = ROOT / "configs" / "quick_schedules" / "instant_test.yaml"
NODE = "MODEL.CASCADE.EXIT."
ONE = ("SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "three.pth"
    torch.save({"model": build_model(host.load_config(INSTANT)).state_dict()}, path)
    return path


@pytest.fixture
def make_preset(options, weights, tmp_path):
    """A checked configuration with presets on top, on these weights."""

    def make(*presets, more=()):
        files = [INSTANT, *(ROOT / "configs" / "exits" / f"{preset}.yaml" for preset in presets)]
        opts = [*options, "OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", str(weights), *more]
        cfg = host.load_config(files, opts)
        host.check_config(cfg)
        return cfg

    return make


@pytest.fixture
def said(caplog):
    """What the project's loggers have said since the last call."""

    def take():
        messages = [r.getMessage() for r in caplog.records if r.name.startswith("cascade_det")]
        caplog.clear()
        return messages

    with caplog.at_level(logging.INFO, "cascade_det"):
        yield take


def test_two_stages_of_three(make_preset, said):
    model, _ = load_model(make_preset("mobile"))
    assert len(model.roi_heads.box_head) == model.roi_heads.cascade.num_stages == 2
    messages = said()
    assert any("left out:\n    roi_heads.box_head.2 (" in message for message in messages)
    assert [message.partition(";")[0] for message in messages if message.startswith("Exits")] == [
        "Exits: 2 stages, IoU 0.5, 0.6"
    ]
    load_model(make_preset("throughput"))
    assert "Exits: off" in said()


def test_four_stages_on_three_are_an_error_but_in_training(make_preset, said):
    with pytest.raises(CheckpointError, match=r"has 3 stages .*IOUS has 4: train stage 3 "):
        host.evaluate(make_preset("cloud"))
    said()
    cfg = make_preset("cloud", more=ONE)
    host.train(cfg)
    messages = said()
    assert any("as initialised:\n    roi_heads.box_head.3 (" in message for message in messages)
    assert sum(message.startswith("Exits: 4 stages, IoU") for message in messages) == 1
    trained = str(Path(cfg.OUTPUT_DIR, "model_final.pth"))
    model, _ = load_model(make_preset("cloud", more=["MODEL.WEIGHTS", trained]))
    assert model.roi_heads.cascade.num_stages == 4


def test_learned_exits_that_nobody_trained_are_an_error_but_in_training(make_preset):
    learned = [f"{NODE}ENABLED", "True", f"{NODE}LEARNED", "('gate',)"]
    with pytest.raises(CheckpointError, match=r"learned exits gate .*FREEZE_DETECTOR"):
        load_model(make_preset(more=learned))
    cfg = make_preset(more=[*learned, *ONE])
    host.train(cfg)
    trained = str(Path(cfg.OUTPUT_DIR, "model_final.pth"))
    load_model(make_preset(more=[*learned, "MODEL.WEIGHTS", trained]))


def test_thresholds_of_another_device_are_told(make_preset, said):
    for name, times in (("Tesla K80", 1), ("", 0)):
        load_model(make_preset(more=[f"{NODE}DEVICE_NAME", name]))
        assert sum("DEVICE_NAME is 'Tesla K80'" in message for message in said()) == times


def test_exits_of_other_weights_are_told(make_preset, weights, said):
    """The name of the weights is the same in either host: it is that of what the file holds."""
    for sha256, times in ((weights_sha256(weights), 0), ("0" * 64, 1)):
        load_model(make_preset(more=[f"{NODE}WEIGHTS_SHA256", sha256, f"{NODE}ENABLED", "True"]))
        assert sum("WEIGHTS_SHA256 is 0000" in message for message in said()) == times
