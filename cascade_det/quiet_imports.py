"""Imports of libraries without a deprecation warning that no user can fix."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast


@contextmanager
def without_jit_warning() -> Iterator[None]:
    """For importing fvcore or Detectron2, which call ``torch.jit.script``.

    Otherwise every log would begin with PyTorch's warning that this is deprecated. Unlike
    ``warnings.catch_warnings``, this keeps filters that the libraries set.
    """
    warnings.filterwarnings("ignore", r"`torch\.jit\.script` is", FutureWarning)
    filters = cast(list[Any], warnings.filters)
    ours = filters[0]
    try:
        yield
    finally:
        filters.remove(ours)
