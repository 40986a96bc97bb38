"""The description of a machine, and its peak rates on a known clock."""

import json

import pytest
import torch

from cascade_det.benchmark import peaks as peaks_module
from cascade_det.benchmark.machine import describe, instructions
from cascade_det.benchmark.peaks import measure_peaks

CPU = torch.device("cpu")


def test_a_machine_is_described_in_plain_values():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        machine = describe()
    finally:
        torch.set_num_threads(threads)
    assert json.loads(json.dumps(machine)) == machine
    assert (machine["threads"], machine["device"]) == (2, "cpu")
    assert machine["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("cpuinfo", "found"),
    [
        ("flags\t\t: fpu avx2 fma avx512f\nflags\t\t: fpu\n", ["avx2", "avx512f", "fma"]),
        ("model name\t: some\nflags : sse2 amx_tile amx_bf16", ["amx_bf16", "amx_tile"]),
        ("Features\t: fp asimd sve bf16\n", ["asimd", "bf16", "sve"]),
        ("vmx flags\t: avx2\n", []),
        ("", []),
    ],
)
def test_instructions_are_those_of_the_first_core(cpuinfo, found):
    assert instructions(cpuinfo) == found


def test_rates_are_amounts_by_seconds(monkeypatch):
    """Every call takes a second: the smallest is long enough, and no larger one runs."""
    returned = []
    monkeypatch.setattr(
        peaks_module, "_best_seconds", lambda call, device: returned.append(call()) or 1.0
    )
    peaks = measure_peaks(CPU, torch.bfloat16)
    assert peaks == {
        "bytes_moved": 2 * 2**27,
        "products": {"bfloat16": 256**3},
        "convolutions": {"bfloat16": 16 * 16 * 256 * 256 * 9},
    }
    shapes = {tuple(out.shape) for out in returned if out.dtype == torch.bfloat16}
    assert shapes == {(256, 256), (1, 256, 16, 16)}


def test_operands_grow_until_a_call_is_long_and_the_best_rate_counts(monkeypatch):
    seconds = iter([0.05, 0.08, 0.3, 0.5, 1.0])
    monkeypatch.setattr(peaks_module, "_best_seconds", lambda call, device: next(seconds))
    peaks = measure_peaks(CPU, torch.float32)
    assert peaks["products"]["float32"] == max(256**3 / 0.05, 512**3 / 0.08, 1024**3 / 0.3)
    assert peaks["convolutions"]["float32"] == 16 * 16 * 256 * 256 * 9 / 0.5


def test_the_clock_gives_the_shortest_call():
    assert 0 < peaks_module._best_seconds(lambda: torch.ones(8).sum(), CPU) < 0.4
