"""What a tile gate saves and loses: the same as by the evaluation command."""

import dataclasses
import json

import pytest
import torch
from calibration_case import INSTANT, make_calibration_case

import train_net
from cascade_det.benchmark.models import open_models
from cascade_det.benchmark.options import Options
from cascade_det.benchmark.setup import Setup
from cascade_det.benchmark.tiles import measure_tiles, tiles_section

MODEL = "ours-fast-exits"
THRESHOLD = "MODEL.CASCADE.EXIT.TILE_THRESHOLD"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A detector with a tile gate."""
    case = make_calibration_case(tmp_path_factory.mktemp("case"), images=4)
    return dataclasses.replace(
        case, options=[*case.options, THRESHOLD, "0.6", "MODEL.CASCADE.FAST.DTYPE", "float32"]
    )


@pytest.fixture(scope="module")
def measured(case):
    options = Options(config_file=(str(INSTANT),), opts=tuple(case.options), images=4)
    setup = Setup(options)
    models, _ = open_models(setup, [MODEL])
    (compared,) = measure_tiles(setup, models)
    return compared, models[MODEL]


def test_ap_is_that_of_an_evaluation_with_the_threshold(case, measured, tmp_path, monkeypatch):
    monkeypatch.setattr("cascade_det.engine.evaluate.plot_report", lambda *_, **__: None)
    compared, _ = measured
    rows = {row["setting"]: row for row in compared["settings"]}
    names = {"exits alone": "0.0", "tile gate from 0.6": "0.6", "finest map not in the RPN": "1.0"}
    for name, threshold in names.items():
        options = [*case.options, THRESHOLD, threshold, "MODEL.CASCADE.FAST.ENABLED", "True"]
        options += ["OUTPUT_DIR", str(tmp_path)]
        arguments = ["--host", "standalone", "--config-file", str(INSTANT), "--eval-only"]
        assert train_net.main([*arguments, *options]) == 0
        results = json.loads((tmp_path / "results.json").read_text())
        for metric in ("AP", "AP75", "AP90", "APs"):
            assert rows[name][metric] == pytest.approx(results["bbox"][metric], nan_ok=True)
            difference = rows[name]["differences"][metric][0]
            before = rows["exits alone"][metric]
            assert difference == pytest.approx(rows[name][metric] - before, nan_ok=True)
    assert rows["exits alone"]["AP"] > 20
    assert rows["exits alone"]["tiles_computed"] == rows["exits alone"]["again"] == 1
    assert rows["finest map not in the RPN"]["tiles_open"] == 0
    assert rows["no finest map"]["tiles_computed"] == 0
    assert "tile gate from 0.6" in tiles_section([compared])


def test_the_model_is_left_as_it_was(measured):
    _, model = measured
    detector = model.adapter.detector
    assert model.exits.tile_threshold == 0.6
    assert detector.roi_in_features == tuple(detector.backbone.strides)[:4]
    assert detector.roi_heads.pooler.strides == (4, 8, 16, 32)


def test_shares_of_tiles_on_drawn_weights(make_options):
    setup = Setup(make_options(size=(256, 384)))
    models, _ = open_models(setup, [MODEL])
    (compared,) = measure_tiles(setup, models)
    rows = {row["setting"]: row for row in compared["settings"]}
    for share in (0.1, 0.2, 0.3):
        row = rows[f"tile gate, {share:.0%} open"]
        assert row["tiles_open"] == pytest.approx(share, abs=0.05)
        assert row["tiles_computed"] >= row["tiles_open"]
    assert "AP" not in rows["exits alone"]
    assert compared["images"] == 1
    assert len(rows["exits alone"]["milliseconds"]["samples"]) == setup.options.rounds
    assert torch.isfinite(torch.tensor(rows["exits alone"]["times_as_fast"]["median"]))
    assert "10% open" in tiles_section([compared])
