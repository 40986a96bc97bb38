"""Tells whether the weights of a module changed."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def weight_versions(modules: Iterable[nn.Module]) -> list[tuple[int, int, int]]:
    """A list that differs after weights were loaded or replaced.

    A training step is not noticed: fused optimisers change weights without a new version.
    """
    tensors = [x for module in modules for x in (*module.parameters(), *module.buffers())]
    return [(id(x), x.data_ptr(), 0 if x.is_inference() else x._version) for x in tensors]
