"""The benchmark command on a small detector."""

import io
import json
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

import cv2
import pytest

from cascade_det.commands import benchmark

DEMO = Path(__file__).resolve().parents[2] / "configs" / "quick_schedules" / "demo.yaml"
QUICK = ("--quick", "--size", "64", "96", "--rounds", "2", "--warmup", "0", "--proposals", "30")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run where Detectron2 cannot be imported: its folder, what it printed, and its JSON."""
    output = tmp_path_factory.mktemp("benchmark")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setitem(sys.modules, "cascade_det.d2.host", None)
        arguments = ["--config-file", str(DEMO), "--survivors", "10", "4", "2"]
        assert benchmark.main([*QUICK, *arguments, "--output", str(output)]) == 0
    return output, printed.getvalue(), json.loads((output / "benchmark.json").read_text())


def test_the_json_is_complete(done):
    _, _, results = done
    assert {"machine", "settings", "contenders", "left_out", "bar"} <= results.keys()
    assert {"threads", "device", "capability", "torch", "torchvision"} <= results["machine"].keys()
    assert results["settings"]["weights"] == "drawn, seed 0"
    ours = ["ours", "ours-fast", "ours-fast-exits"]
    for measurement in ("heads", "whole"):
        [comparison] = results[measurement]
        assert (comparison["batch"], comparison["proposals"]) == (1, 30)
        assert list(comparison["contenders"]) == ours
        for measured in comparison["contenders"].values():
            assert measured["arrived"] == 30
            assert measured["ms_per_image"]["low"] > 0
        assert comparison["contenders"]["ours-fast-exits"]["entered"] == [10, 4, 2]
    assert list(results["parts"][0]["contenders"]) == ours


def test_missing_baselines_are_named_with_the_reason(done):
    _, shown, results = done
    missing = {name for name in results["left_out"] if name.startswith(("plugin", "detectron2"))}
    assert len(missing) == 5
    assert all(
        "cannot be imported" in results["left_out"][name]
        for name in missing - {name for name in missing if name.endswith("autocast")}
    )
    for name in [*missing, "torchvision"]:
        assert re.search(rf"\| {name} +\| left out: ", shown)


def test_the_printed_tables_are_the_written_ones(done):
    output, shown, _ = done
    assert shown.endswith((output / "benchmark.md").read_text())
    for words in ("Machine and settings", "RoI heads alone", "Whole model", "Parts", "replayed"):
        assert words in shown
    assert cv2.imread(str(output / "benchmark.png")).std() > 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--survivors", "10", "5"], "2 numbers"),
        (["--device", "tpu"], "MODEL.DEVICE"),
        (["--device", "cuda:99"], "cuda:99, but"),
        (["--config-file", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_input_is_an_error_before_any_work(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert benchmark.main(["--output", str(tmp_path / "out"), *arguments]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out" / "benchmark.json").exists()


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--contenders", ["ours", "theirs"]),
        ("--contenders", []),
        ("--measure", ["speed"]),
        ("--autocast", ["float8"]),
        ("--proposals", ["1000", "0"]),
        ("--batch", ["0"]),
        ("--rounds", ["0"]),
        ("--warmup", ["-1"]),
        ("--seconds", ["-1"]),
        ("--size", ["800", "16"]),
        ("--images", ["0"]),
    ],
)
def test_wrong_values_are_named_with_their_option(option, values, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main([option, *values])
    assert stopped.value.code == 2
    assert f"argument {option}: " in capsys.readouterr().err


def test_given_options_override_those_of_quick():
    parsed = benchmark._options(
        benchmark._parse(["--quick", "--rounds", "9", "--size", "64", "64"])
    )
    assert (parsed.rounds, parsed.size, parsed.proposals) == (9, (64, 64), (1000,))
    assert not parsed.emulated
    named = benchmark._parse(["--quick", "--contenders", "ours", "--", "MODEL.MASK_ON", "False"])
    options = benchmark._options(named)
    assert options.emulated, "a named model is measured"
    assert options.opts == ("MODEL.MASK_ON", "False")


def test_backbones_are_measured_if_they_are_named():
    assert "backbones" not in benchmark._options(benchmark._parse([])).measure
    named = benchmark._options(benchmark._parse(["--measure", "heads", "backbones"]))
    assert named.measure == ("heads", "backbones")
