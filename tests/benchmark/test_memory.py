"""Peak memory: of allocations whose size is known."""

import functools

import allocations
import pytest

from cascade_det.benchmark.memory import peak_memory
from cascade_det.errors import CascadeDetError

MEGA = 10**6
# The code that a first call loads, and what the allocator rounds up to.
SLACK = 15 * MEGA


def peak(build, *arguments, **options):
    return peak_memory(functools.partial(build, *arguments), **options)


def test_what_a_run_takes_counts_and_neither_the_model_nor_its_building(tmp_path):
    memory = peak(allocations.holding, 500, 300, 200, tmp_path / "threads", threads=3)
    assert memory.above_model == pytest.approx(200 * MEGA, abs=SLACK)
    assert memory.total > 500 * MEGA
    assert (tmp_path / "threads").read_text() == "3"


def test_what_runs_keep_adds_up():
    memory = peak(allocations.keeping, 100, runs=3)
    assert memory.above_model == pytest.approx(300 * MEGA, abs=SLACK)


def test_an_error_of_the_model_is_told():
    with pytest.raises(ValueError, match="no such layer"):
        peak(allocations.failing)


def test_a_process_that_is_ended_is_told():
    with pytest.raises(CascadeDetError, match="memory ran out"):
        peak(allocations.killed)
