"""Reuse of freed CPU memory by the C library."""

from __future__ import annotations

import ctypes
import platform

# Parameters of glibc's mallopt(3), and the values at which its own tuning ends.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_ADJUSTED_MMAP_THRESHOLD = 32 * 2**20
_DEFAULT_MMAP_MAX = 65536


def keep_freed_memory(keep: bool = True) -> bool:
    """Let this process keep the memory of freed tensors for the next ones, or return it.

    By default glibc maps the memory of every large tensor and unmaps it again, so each page of
    each feature map is zeroed again, which can take longer than computing it. Kept memory stays at
    its peak until the process ends.

    Args:
        keep: ``False`` returns the kept memory and restores glibc's default.

    Returns:
        Whether it worked: only with glibc, that is on most Linux systems.
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
