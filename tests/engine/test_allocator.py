"""Where freed tensors go, as the C library's own books and the resident memory tell."""

import ctypes
import json
import platform
import subprocess
import sys

import pytest

COUNT, TENSOR_BYTES = 3, 40 * 2**20

# In a process of its own, because the settings hold for the whole of one. `struct mallinfo2` has
# ten fields of type size_t, see mallinfo(3). At last there are more tensors than were kept,
# because free room within the heap serves some of them under any setting.
PROGRAM = f"""
import ctypes, json, resource
import torch
from cascade_det.engine.allocator import keep_freed_memory

class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd",
        "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

libc = ctypes.CDLL(None)
mallinfo2 = libc.mallinfo2
mallinfo2.restype = Mallinfo
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def books(count={COUNT}):
    tensors = [torch.full(({TENSOR_BYTES},), 1, dtype=torch.uint8) for _ in range(count)]
    used = mallinfo2()
    del tensors
    return {{"mapped": used.hblkhd, "heap": used.arena, "resident": resident()}}

def end_of_heap():
    block = libc.malloc({TENSOR_BYTES})
    used = mallinfo2()
    libc.free(block)
    return [used.arena, mallinfo2().arena]

result = {{"default": books(), "told": [keep_freed_memory()]}}
result["end_of_heap"] = end_of_heap()
result["kept"] = books()
result["told"].append(keep_freed_memory(False))
result["resident"] = resident()
result["returned"] = books(4 * {COUNT})
print(json.dumps(result))
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="the C library is not glibc 2.33 or newer",
)
def test_memory_is_kept_until_it_is_given_back():
    command = [sys.executable, "-c", PROGRAM]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result = json.loads(output)
    assert result["told"] == [True, True]

    default, kept = result["default"], result["kept"]
    assert default["mapped"] >= COUNT * TENSOR_BYTES
    assert kept["mapped"] < TENSOR_BYTES
    assert kept["heap"] >= COUNT * TENSOR_BYTES
    assert kept["resident"] - default["resident"] > (COUNT - 1) * TENSOR_BYTES
    used, freed = result["end_of_heap"]
    assert freed == used

    assert result["resident"] - default["resident"] < TENSOR_BYTES
    assert result["returned"]["mapped"] >= TENSOR_BYTES


def test_other_libraries_are_left_alone(monkeypatch):
    from cascade_det.engine.allocator import keep_freed_memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False
