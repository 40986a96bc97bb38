"""Gates that take longer than they save are switched off; times are made up, the replay is real."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
from recorded_trials import make_calibrator
from scene_detectors import COSTS, SceneDetector, batches_of

from cascade_det.calibration.calibrator import build_policy
from cascade_det.calibration.gate_costs import GateCost, without_costly_gates
from cascade_det.calibration.image_matching import ImageMatcher
from cascade_det.calibration.latency_model import LatencyModel
from cascade_det.calibration.recording import record_dataset
from cascade_det.calibration.target import Target

SETTING = {"PRUNE_THRESHOLDS": (0.35, 0.35), "REGION_BUDGET": (18, 0, 0)}
LATENCY = LatencyModel(20.0, *COSTS, "made up", 1, 99, 0.0)


@pytest.fixture(scope="module")
def detector():
    return SceneDetector(images=8)


@pytest.fixture(scope="module")
def calibrator(detector):
    """The objects are the first proposals of every image."""
    recording = record_dataset(detector, batches_of(detector, 4), 8)
    ids = recording.image_ids
    boxes = [p[0].tolist() for p in detector.scene.proposals]
    content = {
        "images": [{"id": i, "height": 400, "width": 400} for i in ids],
        "categories": [{"id": c, "name": str(c)} for c in (1, 2, 3)],
        "annotations": [
            {"image_id": i, "category_id": 1, "bbox": [x, y, x2 - x, y2 - y]}
            for i, (x, y, x2, y2) in zip(ids, boxes, strict=True)
        ],
    }
    return make_calibrator(recording, ImageMatcher(content, [1, 2, 3]))


def measured_saving(detector, calibrator, gate, off=()):
    """By running the detector with the gate and without it."""

    def milliseconds(gates_off):
        setting = {**SETTING, "GATES_OFF": gates_off}
        detector.set_exits(build_policy(calibrator.cfg, setting, None))
        counts = [detector.detect(batch).stats.entered for batch in batches_of(detector, 1)]
        per_call, per_region = np.array(COSTS)
        return np.mean([per_call @ (np.array(c) > 0) + per_region @ c for c in counts])

    detector.eval()
    saving = milliseconds((*off, gate)) - milliseconds(off)
    detector.set_exits(None)
    assert saving > 0.01
    return saving


def switched_off(detector, calibrator, gates):
    detector.gate_milliseconds = gates
    settings = {"exits": SETTING}
    batches = batches_of(detector, 1)
    changed = without_costly_gates(calibrator, settings, detector, batches, LATENCY, rounds=1)
    return changed["exits"].get("GATES_OFF", ())


@pytest.mark.parametrize("gate", [0, 1, 2])
@pytest.mark.parametrize(("share", "is_off"), [(0.99, False), (1.01, True)])
def test_a_gate_that_takes_more_than_it_saves(detector, calibrator, gate, share, is_off):
    gates = [0.0] * 3
    gates[gate] = share * measured_saving(detector, calibrator, gate)
    assert switched_off(detector, calibrator, gates) == ((gate,) if is_off else ())


def test_a_later_gate_is_judged_without_those_that_are_off(detector, calibrator):
    alone = measured_saving(detector, calibrator, 1)
    without_first = measured_saving(detector, calibrator, 1, off=(0,))
    between = (alone + without_first) / 2
    assert without_first > 1.02 * alone
    assert switched_off(detector, calibrator, [1e3, between, 0.0]) == (0,)
    assert switched_off(detector, calibrator, [0.0, between, 0.0]) == (1,)
    assert switched_off(detector, calibrator, [1e3] * 3) == (0, 1, 2)


def test_the_log_has_a_sentence_for_each_gate(detector, calibrator, caplog):
    with caplog.at_level(logging.INFO):
        switched_off(detector, calibrator, [0.0, 1e3, 0.0])
    told = [r.getMessage() for r in caplog.records if "exits.yaml" in r.getMessage()]
    assert len(told) == 3
    assert told[0].startswith("exits.yaml: the gate before stage 0 takes 0.00 ms per image")
    assert told[0].endswith("it stays")
    assert told[1].startswith("exits.yaml: the gate after stage 0 takes 1000.00 ms per image")
    assert told[1].endswith("it is switched off")
    assert str(GateCost(2, 0.25, 0.5)) == (
        "the gate after stage 1 takes 0.25 ms per image and saves 0.50 ms: it stays"
    )


def test_gates_that_are_off_change_the_calibration(calibrator):
    found = calibrator.calibrate(Target(exit_rate=0.2))
    again = calibrator.with_gates_off(found, (1,), Target(latency_ms=1.0))
    assert again.plain == again.setting == {**found.plain, "GATES_OFF": (1,)}
    assert again.reported.entered[1].sum() > found.reported.entered[1].sum()
    assert calibrator.with_gates_off(found, (), Target(latency_ms=1.0)) is found


@pytest.mark.parametrize(("most", "is_kept"), [(0.4, True), (0.5, False)])
def test_no_gate_is_off_where_that_breaks_a_promise(calibrator, monkeypatch, most, is_kept):
    found, changed = SimpleNamespace(choice=None), SimpleNamespace(drop=0.5)
    monkeypatch.setattr(calibrator, "_evaluate", lambda *_: changed)
    again = calibrator.with_gates_off(found, (1,), Target(max_ap_drop=most))
    assert again is (found if is_kept else changed)
