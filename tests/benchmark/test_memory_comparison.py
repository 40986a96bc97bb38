"""Peak memory of contenders: built from plain options, and beside the peer's."""

import pickle
from pathlib import Path

import pytest

from cascade_det.benchmark import memory_comparison
from cascade_det.benchmark.memory import Memory
from cascade_det.benchmark.memory_comparison import compare_memory, memory_sections
from cascade_det.benchmark.options import Options, Survivors

INSTANT = Path(__file__).resolve().parents[2] / "configs" / "quick_schedules" / "instant_test.yaml"
OPTIONS = Options(
    config_file=(str(INSTANT),),
    opts=("MODEL.WEIGHTS", "", "SOLVER.IMS_PER_BATCH", 2),
    size=(64, 96),
    proposals=(12,),
    threads=1,
    survivors=Survivors((8, 4, 2), "by hand"),
)


def test_contenders_and_steps_are_rebuilt_in_the_process_and_run(monkeypatch):
    """That process is this one here; what it is given has to be picklable."""
    detected, devices = [], []

    def here(build, *, device, threads):
        run = pickle.loads(pickle.dumps(build))()
        detected.append(run())
        devices.append((device, threads))
        return Memory(total=100, above_model=10 * len(detected))

    monkeypatch.setattr(memory_comparison, "peak_memory", here)
    found = compare_memory(OPTIONS, ["ours", "ours-fast-exits"], ["ours"], images=2)
    assert devices == [("cpu", 1)] * 3
    without, with_exits, _ = detected
    assert without[1].entered == [12, 12, 12]
    assert with_exits[1].entered == [8, 4, 2]
    assert found["inference"]["contenders"] == {
        "ours": {"total": 100, "above_model": 10},
        "ours-fast-exits": {"total": 100, "above_model": 20},
    }
    assert found["training"] == {
        "batch": 2,
        "contenders": {"ours": {"total": 100, "above_model": 30}},
    }


def test_ratios_are_to_the_cascade_of_detectron2(monkeypatch):
    sizes = {"ours": 30, "detectron2-cascade": 40}

    def known(build, **_):
        return Memory(total=1000, above_model=sizes[build.args[1]])

    monkeypatch.setattr(memory_comparison, "peak_memory", known)
    found = compare_memory(OPTIONS, list(sizes), [], images=2)
    ratios = {name: row["ratio"] for name, row in found["inference"]["contenders"].items()}
    assert ratios == pytest.approx({"ours": 0.75, "detectron2-cascade": 1.0})


def test_the_tables_are_in_megabytes_and_one_of_nothing_is_left_out():
    memory = {"total": 2_000_000_000, "above_model": 500_000_000, "ratio": 0.8}
    sections = memory_sections(
        {
            "inference": {"batch": 1, "proposals": 12, "contenders": {"ours": memory}},
            "training": {"batch": 2, "contenders": {}},
        }
    )
    (section,) = sections
    cells = [cell.strip() for cell in section.splitlines()[-1].split("|")[1:-1]]
    assert cells == ["ours", "500", "2000", "0.80"]
