"""What is kept need not be mapped again, as the page faults of a process of its own tell."""

import json
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource, sys
import torch
from cascade_det.engine.allocator import keep_freed_memory

def faults():
    for i in range(20):
        if i == 16:  # the heap has reached its size by then
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(64 * 2**20, dtype=torch.uint8).fill_(1)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 4

told = [keep_freed_memory()]
kept = faults()
told.append(keep_freed_memory(False))
print(json.dumps({"told": told, "kept": kept, "returned": faults()}))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_kept_memory_is_used_again():
    command = [sys.executable, "-c", PROGRAM]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result = json.loads(output)
    assert result["told"] == [True, True]
    # 64 MiB are 16,384 pages of 4 KiB, or 32 huge ones.
    assert result["kept"] <= 10 < 30 <= result["returned"]


def test_other_libraries_are_left_alone(monkeypatch):
    from cascade_det.engine.allocator import keep_freed_memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False
