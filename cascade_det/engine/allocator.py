"""What the C library does with memory that tensors on the CPU have given back."""

from __future__ import annotations

import ctypes
import platform

# Parameters of glibc's mallopt(3), and the values that its own adjustment ends at.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_ADJUSTED_MMAP_THRESHOLD = 32 * 2**20
_DEFAULT_MMAP_MAX = 65536


def keep_freed_memory(keep: bool = True) -> bool:
    """Let this process keep the memory of freed tensors for the next ones, or give it back again.

    By default glibc takes the memory of every large tensor from the system and returns it, so that
    each page of each feature map is mapped and zeroed anew, which can take longer than to compute
    it. Kept memory is that of the largest moment; the process returns it when it ends.

    Args:
        keep: ``False`` returns what was kept and maps large tensors one by one again, as glibc
            does by itself, except those that find room between what is still in use in the heap.

    Returns:
        Whether it could be done: only with glibc, that is on most Linux systems.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    if keep:
        settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1}
    else:
        settings = {
            _M_MMAP_MAX: _DEFAULT_MMAP_MAX,
            _M_MMAP_THRESHOLD: _ADJUSTED_MMAP_THRESHOLD,
            _M_TRIM_THRESHOLD: 2 * _ADJUSTED_MMAP_THRESHOLD,
        }
    done = all(libc.mallopt(parameter, value) == 1 for parameter, value in settings.items())
    if not keep:
        libc.malloc_trim(0)
    return done
