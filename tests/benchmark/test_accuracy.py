"""AP of settings: the same as by the evaluation command."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from calibration_case import INSTANT, make_calibration_case

import train_net
from cascade_det.benchmark import accuracy
from cascade_det.benchmark.accuracy import (
    SETTINGS,
    accuracy_section,
    measure_accuracy,
    time_in_turn,
)
from cascade_det.benchmark.timing import spread
from cascade_det.config import load_config
from cascade_det.errors import ConfigError

OFF, EXITS = "exits off, float32", "exits"
KEYS = ("AP", "AP75", "AP90")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("cascade_det.engine.evaluate.plot_report", lambda *_, **__: None)
    monkeypatch.setattr("cascade_det.engine.evaluate.write_analysis", lambda *_, **__: None)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A detector whose exits let ten and four regions into the later stages."""
    case = make_calibration_case(tmp_path_factory.mktemp("case"), images=4)
    budget = ["MODEL.CASCADE.EXIT.REGION_BUDGET", "(0, 10, 4)"]
    return dataclasses.replace(case, options=[*case.options, *budget])


@pytest.fixture
def cfg(case):
    return load_config(INSTANT, case.options)


def test_metrics_are_those_of_an_evaluation_of_the_setting(case, cfg, tmp_path):
    measured = measure_accuracy(cfg, tmp_path / "accuracy")
    rows = {row["setting"]: row for row in measured["settings"]}
    assert list(rows) == list(SETTINGS)
    assert measured["images"] == 4
    for setting in (OFF, EXITS):
        options = [*case.options, *map(str, SETTINGS[setting]), "OUTPUT_DIR", str(tmp_path)]
        arguments = ["--host", "standalone", "--config-file", str(INSTANT), "--eval-only"]
        assert train_net.main([*arguments, *options]) == 0
        results = json.loads((tmp_path / "results.json").read_text())
        assert [rows[setting][key] for key in KEYS] == [results["bbox"][key] for key in KEYS]
        entered = [results["exits"][f"stage{stage}"]["entered_per_image"] for stage in range(3)]
        assert rows[setting]["entered"] == entered
    assert rows[OFF]["AP"] > 20
    assert rows[OFF]["entered"][0] == rows[OFF]["entered"][2]
    assert rows[EXITS]["entered"][1:] == [10, 4]
    # In float32 the fast detector differs by rounding only.
    assert rows["fast"]["entered"] == rows[OFF]["entered"]
    assert rows["fast"]["milliseconds"]["median"] > 0
    assert len(rows["fast"]["milliseconds"]["samples"]) == 2  # batches of two
    assert rows[OFF]["times_as_fast"]["samples"] == [1.0, 1.0]


def test_settings_with_exits_need_exits_in_the_configuration(case, tmp_path, monkeypatch):
    dataset = SimpleNamespace(records=[], source=SimpleNamespace(name="cells"))
    detector = SimpleNamespace(device="cpu", dtype="float32", detect=lambda batch: None)
    results = {
        "bbox": dict.fromkeys(KEYS, 50.0),
        "exits": {},
    }
    monkeypatch.setattr(accuracy, "load_detector", lambda cfg: (detector, [dataset]))
    monkeypatch.setattr(accuracy, "test_loader", lambda *_: [[{}]])
    monkeypatch.setattr(accuracy, "evaluate_dataset", lambda *_, **__: results)
    cfg = load_config(INSTANT, [*case.options, "MODEL.CASCADE.EXIT.ENABLED", "False"])
    rows = measure_accuracy(cfg, tmp_path)["settings"]
    assert [row["setting"] for row in rows] == [OFF, "fast"]


def test_wrong_settings_are_errors_before_any_runs(cfg, tmp_path, monkeypatch):
    settings = {OFF: SETTINGS[OFF], "other": ("MODEL.ROI_HEADS.NMS_THRESH_TEST", -1.0)}
    monkeypatch.setattr(accuracy, "SETTINGS", settings)
    with pytest.raises(ConfigError, match="NMS_THRESH_TEST"):
        measure_accuracy(cfg, tmp_path)
    assert not list(tmp_path.iterdir())


def test_times_are_taken_in_turn_and_are_per_image():
    clock, calls = [0.0], []

    def runner(name, seconds):
        def detect(batch):
            calls.append((name, batch))
            clock[0] += seconds * len(batch)

        return detect

    detect = {"slow": runner("slow", 3.0), "quick": runner("quick", 1.0)}
    times = time_in_turn(detect, [["a", "b"], ["c"]], "cpu", clock=lambda: clock[0])
    assert times == {"slow": [3000.0, 3000.0], "quick": [1000.0, 1000.0]}
    order = [["a", "b"], ["a", "b"], ["c"]]  # the first to warm up
    assert calls == [(name, batch) for batch in order for name in ("slow", "quick")]


def test_the_table_has_differences_from_the_first_setting():
    rows = [
        {"setting": OFF, "AP": 60.0, "AP75": 70.0, "AP90": 20.0, "milliseconds": spread([90.0])},
        {
            "setting": "fast",
            "AP": 59.75,
            "AP75": 70.5,
            "AP90": 20.0,
            "milliseconds": spread([30.0]),
        },
    ]
    faster = {"median": 3.0, "low": 2.9, "high": 3.25}
    rows = [{**row, "entered": [100.0, 40.0], "times_as_fast": faster} for row in rows]
    text = accuracy_section({"dataset": "cells", "images": 7, "settings": rows})
    cells = [cell.strip() for cell in text.splitlines()[-1].split("|")[1:-1]]
    wanted = [
        "fast",
        "59.75",
        "70.50",
        "20.00",
        "-0.25",
        "+0.50",
        "+0.00",
        "30.0",
        "3.00 (2.90 to 3.25)",
    ]
    assert cells == [*wanted, "100.0, 40.0"]
