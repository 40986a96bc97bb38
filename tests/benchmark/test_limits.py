"""The limit of the machine by part, against figures worked out by hand."""

import functools
import json

import pytest
import torch

from cascade_det.benchmark import limits as limits_module
from cascade_det.benchmark.limits import find_limits, limits_section, measure_limits
from cascade_det.benchmark.models import Standalone, open_models
from cascade_det.benchmark.work import Work, count_work

# Per millisecond, a thousand multiply-adds and four thousand bytes; half precision is faster.
PEAKS = {
    "bytes_moved": 4e6,
    "products": {"float32": 1e6, "bfloat16": 1.5e6},
    "convolutions": {"float32": 0.5e6, "bfloat16": 2e6},
}
WORK = {
    "busy": Work(multiply_adds=10_000, floats=1000),
    "moving": Work(multiply_adds=1000, floats=3000, other_bytes=4000),
    "idle": Work(),
    "untimed": Work(multiply_adds=10_000),
}
MILLISECONDS = {"busy": 15.0, "moving": 8.0, "idle": 0.5}


@pytest.fixture
def rows():
    found = find_limits(WORK, MILLISECONDS, PEAKS, torch.float32)
    assert [row["part"] for row in found] == ["busy", "moving", "idle", "total"]
    return found


def test_the_limit_is_the_longer_of_operations_and_transfer(rows):
    busy, moving, idle, total = rows
    assert (busy["operations_ms"], busy["transfer_ms"]) == pytest.approx((10.0, 1.0))
    assert busy["ratio"] == pytest.approx(15 / 10)
    assert (moving["operations_ms"], moving["transfer_ms"]) == pytest.approx((1.0, 4.0))
    assert moving["ratio"] == pytest.approx(8 / 4)
    assert idle["limit_ms"] == 0
    assert idle["ratio"] != idle["ratio"]
    assert (total["multiply_adds"], total["bytes_moved"]) == (11_000, 4000 + 16_000)
    assert total["limit_ms"] == pytest.approx(10 + 4)
    assert total["ratio"] == pytest.approx(23.5 / 14)


def test_half_precision_has_its_own_rate_and_half_the_bytes_of_floats():
    busy, moving, *_ = find_limits(WORK, MILLISECONDS, PEAKS, torch.bfloat16)
    assert busy["operations_ms"] == pytest.approx(5.0)
    assert moving["transfer_ms"] == pytest.approx((6000 + 4000) / 4000)


def test_the_table_has_shares_and_ratios(rows):
    results = {
        "contender": "ours",
        "batch": 1,
        "proposals": 300,
        "dtype": "float32",
        "peaks": PEAKS,
        "parts": rows,
    }
    text = limits_section(results)
    busy = next(line for line in text.splitlines() if line.startswith("| busy"))
    assert [cell.strip() for cell in busy.split("|")[6:9]] == ["15.00", "63.8", "1.50"]
    assert "ours, batch of 1, 300 proposals" in text


def test_work_of_a_detector_is_that_of_its_layers(setup):
    """Convolutions by their maps, linear layers by their regions."""
    detector, batch = setup.build_ours(), setup.batches(1)[0]
    Standalone(detector).limit_proposals(40)
    seen = {"backbone": 0, "rpn": 0, "heads": 0}

    def count(part, layer, inputs, out):
        if isinstance(layer, torch.nn.Conv2d):
            seen[part] += out.numel() * layer.weight[0].numel()
        elif isinstance(layer, torch.nn.Linear):
            seen[part] += inputs[0].numel() * layer.out_features

    modules = detector.backbone, detector.proposal_generator, detector.roi_heads
    for part, module in zip(seen, modules, strict=True):
        for layer in module.modules():
            layer.register_forward_hook(functools.partial(count, part))
    work = count_work(detector, batch)
    assert list(work)[:3] == ["preprocess", "backbone", "rpn"]
    assert work["backbone"].multiply_adds == seen["backbone"] > 0
    assert work["rpn"].multiply_adds == seen["rpn"] > 0
    pooling = detector.roi_heads.pooler
    stages = sum(part.multiply_adds for name, part in work.items() if name.startswith("stage"))
    assert stages >= seen["heads"] > 0
    # The rest is embedding bags: fewer than 16 rows of 64 channels per bin.
    assert stages - seen["heads"] < 3 * 40 * pooling.output_size**2 * 16 * 64
    assert work["postprocess"].multiply_adds == 0


def test_the_fastest_model_is_compared_with_the_peaks(setup, monkeypatch):
    monkeypatch.setattr(limits_module, "measure_peaks", lambda *_: PEAKS)
    opened, left_out = open_models(setup, ["ours", "ours-fast-exits"])
    assert not left_out
    results = measure_limits(setup, opened)
    assert json.loads(json.dumps(results))["contender"] == "ours-fast-exits"
    parts = {part["part"]: part for part in results["parts"]}
    # 10 and 3 regions enter stages 1 and 2.
    later = [parts[f"stage{stage}"]["multiply_adds"] for stage in (1, 2)]
    assert 2.8 < later[0] / later[1] < 3.8
    assert parts["backbone"]["measured_ms"] > 0
    assert measure_limits(setup, {}) == {}
