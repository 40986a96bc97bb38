"""Peak memory, of allocations of known size and of models, beside the baseline's."""

import functools
import pickle

import allocations
import pytest

from cascade_det.benchmark import memory
from cascade_det.benchmark.memory import compare_memory, memory_sections, peak_memory
from cascade_det.errors import CascadeDetError

MEGA = 10**6
# Code that the first call loads, and what the allocator rounds up to.
SLACK = 15 * MEGA


def peak(build, *arguments, **options):
    return peak_memory(functools.partial(build, *arguments), **options)


def test_only_what_a_call_takes_is_above_the_model(tmp_path):
    found = peak(allocations.holding, 500, 300, 200, tmp_path / "threads", threads=3)
    assert found["above_model"] == pytest.approx(200 * MEGA, abs=SLACK)
    assert found["total"] > 500 * MEGA
    assert (tmp_path / "threads").read_text() == "3"


def test_what_calls_keep_adds_up():
    found = peak(allocations.keeping, 150)
    assert found["above_model"] == pytest.approx(300 * MEGA, abs=SLACK)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (allocations.failing, ValueError, "no such layer"),
        (allocations.killed, CascadeDetError, "memory ran out"),
    ],
)
def test_errors_of_the_process_are_raised(build, error, words):
    with pytest.raises(error, match=words):
        peak(build)


def test_models_and_steps_are_built_in_the_process_and_run(make_options, monkeypatch):
    """Here, the process is this one; what it gets must be picklable."""
    returned, arguments = [], []

    def here(build, **options):
        returned.append(pickle.loads(pickle.dumps(build))()())
        arguments.append(options)
        return {"total": 100, "above_model": 10 * len(returned)}

    monkeypatch.setattr(memory, "peak_memory", here)
    options = make_options(threads=1)
    found = compare_memory(options, ["ours", "ours-fast-exits"], ["ours"], images=2)
    assert arguments == [{"device": "cpu", "threads": 1}] * 3
    assert [stats.entered for _, stats in returned[:2]] == [[40, 40, 40], [20, 10, 3]]
    assert found["inference"]["contenders"] == {
        "ours": {"total": 100, "above_model": 10},
        "ours-fast-exits": {"total": 100, "above_model": 20},
    }
    assert found["training"] == {
        "batch": 2,
        "contenders": {"ours": {"total": 100, "above_model": 30}},
    }


def test_ratios_are_to_detectron2s_cascade(make_options, monkeypatch):
    sizes = {"ours": 30, "detectron2-cascade": 40}

    def known(build, **_):
        return {"total": 1000, "above_model": sizes[build.args[1]]}

    monkeypatch.setattr(memory, "peak_memory", known)
    found = compare_memory(make_options(), list(sizes), [], images=2)
    ratios = {name: row["ratio"] for name, row in found["inference"]["contenders"].items()}
    assert ratios == pytest.approx({"ours": 0.75, "detectron2-cascade": 1.0})


def test_tables_are_in_megabytes_and_empty_ones_are_left_out():
    peaks = {"total": 2_000_000_000, "above_model": 500_000_000, "ratio": 0.8}
    [section] = memory_sections(
        {
            "inference": {"batch": 1, "proposals": 12, "contenders": {"ours": peaks}},
            "training": {"batch": 2, "contenders": {}},
        }
    )
    cells = [cell.strip() for cell in section.splitlines()[-1].split("|")[1:-1]]
    assert cells == ["ours", "500", "2000", "0.80"]
