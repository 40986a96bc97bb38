"""Calibration of a model of Detectron2: the same files, and what they promise is what it does."""

import functools
import json

import pytest

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from calibration_case import INSTANT, make_calibration_case

from cascade_det.calibration import comparison as exit_comparison
from cascade_det.calibration.calibrate import calibrate
from cascade_det.calibration.recording import _SHARES
from cascade_det.calibration.target import Options, Target
from cascade_det.d2 import host
from cascade_det.errors import ConfigError
from cascade_det.weights import read_weights_file, weights_sha256

pytestmark = pytest.mark.needs_detectron2

OPTIONS = Options(trials=10, score=0.3, timed_batches=1, rounds=1)
TARGETS = {
    "drop": {"max_ap_drop": 8.0},
    "risk": {"risk": 0.5, "delta": 0.2},
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_calibration_case(tmp_path_factory.mktemp("case"), images=8)


@pytest.fixture(autouse=True)
def quick(monkeypatch, no_pictures):
    """What takes longer than everything else, and is the same in both hosts."""
    assessment = "cascade_det.calibration.assessment"
    monkeypatch.setattr(f"{assessment}.usual_settings", lambda *_: {})
    monkeypatch.setattr("cascade_det.calibration.recording._SHARES", _SHARES[:5])
    fewer_rounds = functools.partial(exit_comparison.compare, rounds=20)
    monkeypatch.setattr(f"{assessment}.compare", fewer_rounds)
    monkeypatch.setattr(
        "cascade_det.calibration.report.plot_front", lambda _, path, **__: path.touch()
    )


def load(files, options):
    cfg = host.load_config(files, options)
    host.check_config(cfg)
    return cfg


@pytest.mark.parametrize("target", TARGETS)
def test_an_evaluation_gives_what_was_promised(case, target, tmp_path):
    cfg = load(INSTANT, case.options)
    folder = tmp_path / "exits"
    found = calibrate(
        cfg, lambda: host.open_detector(cfg), Target(**TARGETS[target]), folder, OPTIONS
    )
    expected = found["expected"]
    assert json.loads((folder / "calibration.json").read_text())["expected"] == expected
    options = case.with_truth(f"reporting_{target}", case.reporting_half())
    shadow = ["CASCADE.SHADOW_SHARE", "1.0", "OUTPUT_DIR", str(tmp_path)]
    results = host.evaluate(load([INSTANT, folder / "exits.yaml"], [*options, *shadow]))
    assert results["bbox"]["AP"] == pytest.approx(expected["AP"], abs=1e-3)
    entered = [results["exits"][f"stage{stage}"]["entered"] for stage in range(3)]
    assert sum(entered) / (3 * 4 * 60) == pytest.approx(expected["regions_left"])
    assert results["shadow"]["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    weights = read_weights_file(found["weights"]["file"]).weights
    assert found["weights"]["sha256"] == weights_sha256(weights)
    for path in folder.glob("*.yaml"):
        told = load([INSTANT, path], case.options).MODEL.CASCADE.EXIT.WEIGHTS_SHA256
        assert told == found["weights"]["sha256"]


def test_heads_without_exits(case, tmp_path):
    heads = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.CASCADE.EXIT.ENABLED", "False"]
    cfg = load(INSTANT, [*case.options, *heads])
    with pytest.raises(ConfigError, match=r"CascadeROIHeads.*EarlyExitCascadeROIHeads"):
        calibrate(cfg, lambda: host.open_detector(cfg), Target(exit_rate=0.1), tmp_path, OPTIONS)
