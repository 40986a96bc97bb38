"""Imports of libraries that PyTorch has something to say about, which no user here can mend."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast


@contextmanager
def without_jit_warning() -> Iterator[None]:
    """Import what compiles functions by ``torch.jit.script``, as fvcore and Detectron2 do.

    Every log would else begin with PyTorch's remark that this is deprecated. Filters that the
    libraries set themselves stay, which ``warnings.catch_warnings`` would take away.
    """
    warnings.filterwarnings("ignore", r"`torch\.jit\.script` is", FutureWarning)
    filters = cast(list[Any], warnings.filters)
    ours = filters[0]
    try:
        yield
    finally:
        filters.remove(ours)
