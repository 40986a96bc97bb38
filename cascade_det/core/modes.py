"""Modules that are in evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(*parts: nn.Module) -> Iterator[None]:
    """Within the block all modules are in evaluation mode; afterwards in the mode of before."""
    # Module by module: what is frozen in evaluation mode inside a training model stays so.
    modes = [(module, module.training) for part in parts for module in part.modules()]
    for part in parts:
        part.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
