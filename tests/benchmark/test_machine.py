"""The description of a machine, and its peak rates, on a clock that is known."""

import json

import pytest
import torch

from cascade_det.benchmark.machine import Peaks, describe, instructions, measure_peaks


def test_a_machine_is_described_in_plain_values():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        machine = describe()
    finally:
        torch.set_num_threads(threads)
    assert json.loads(json.dumps(machine)) == machine
    assert machine["threads"] == 2
    assert machine["device"] == "cpu"
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


def test_rates_are_the_amounts_by_the_seconds():
    """Every piece of work takes a second: the smallest is long enough, and no other runs."""
    runs = []

    def clock(work, device):
        runs.append(work())
        return 1.0

    peaks = measure_peaks(dtypes=(torch.float32, torch.bfloat16), best_seconds=clock)
    assert peaks.products == {"float32": 256**3, "bfloat16": 256**3}
    assert peaks.convolutions == dict.fromkeys(("float32", "bfloat16"), 16 * 16 * 256 * 256 * 9)
    assert peaks.bytes_moved == 2 * 2**27
    assert [tuple(out.shape) for out in runs[:4]] == [(256, 256)] * 2 + [(1, 256, 16, 16)] * 2
    assert [out.dtype for out in runs[:2]] == [torch.float32, torch.bfloat16]


def test_work_grows_until_it_takes_long_and_the_best_rate_counts():
    seconds = iter([0.05, 0.08, 0.3, 0.5, 1.0])
    peaks = measure_peaks(dtypes=(torch.float32,), best_seconds=lambda work, device: next(seconds))
    assert peaks.products["float32"] == max(256**3 / 0.05, 512**3 / 0.08, 1024**3 / 0.3)
    assert peaks.convolutions["float32"] == 16 * 16 * 256 * 256 * 9 / 0.5


def test_the_faster_of_products_and_convolutions_is_the_peak():
    peaks = Peaks(1.0, {"float32": 2.0, "bfloat16": 5.0}, {"float32": 3.0, "bfloat16": 4.0})
    assert peaks.multiply_adds(torch.float32) == 3.0
    assert peaks.multiply_adds(torch.bfloat16) == 5.0
    with pytest.raises(KeyError):
        peaks.multiply_adds(torch.float16)


def test_real_rates_are_measured():
    peaks = measure_peaks(dtypes=(torch.float32,))
    assert min(peaks.bytes_moved, *peaks.products.values(), *peaks.convolutions.values()) > 0
