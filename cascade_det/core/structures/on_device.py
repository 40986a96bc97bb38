"""Constants and counts that keep the CPU from waiting for a GPU.

A GPU works through a queue. Whatever needs a number from it, and every copy of ordinary host memory
to it, makes the CPU wait until the queue is empty, and the GPU idles while it is filled again.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

Values = tuple[int | float | bool, ...] | tuple[tuple[int | float, ...], ...]


def is_recorded() -> bool:
    """Whether a tracer or an export records the operations, for inputs of other sizes too."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


@lru_cache(maxsize=256)
def device_constant(values: Values, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor, sent to its device once and kept: not to be changed.

    Args:
        values: numbers, or rows of numbers.
        dtype: of the tensor.
        device: of the tensor.
    """
    with torch.inference_mode(False):  # A tensor of inference mode could not be trained with.
        return torch.tensor(values, dtype=dtype, device=device)


def take_rows(values: Tensor, rows: Tensor | slice) -> Tensor:
    """``values[rows]`` for int64 ``rows``: in a third of the time that indexing takes for a few."""
    return values.index_select(0, rows) if isinstance(rows, Tensor) else values[rows]


def group_sizes(groups: Tensor, count: int) -> Tensor:
    """How many rows each of ``count`` groups has: int64 ``[count]``.

    ``torch.bincount`` waits for a GPU twice, for the smallest and for the largest group.

    Args:
        groups: int64 ``[R]`` in ``[0, count)``, the group of each row.
        count: of groups.
    """
    sizes = torch.zeros(count, dtype=torch.int64, device=groups.device)
    return sizes.scatter_add_(0, groups, torch.ones_like(groups))


def indices_by_group(groups: Tensor, count: int) -> list[Tensor]:
    """The rows of each of ``count`` groups, in order, with one wait for all groups.

    Args:
        groups: int64 ``[R]`` in ``[0, count)``, the group of each row.
        count: of groups.

    Returns:
        ``count`` int64 tensors of indices into ``groups``.
    """
    if is_recorded():
        # The group sizes must stay dynamic.
        return [torch.nonzero(groups == group).squeeze(1) for group in range(count)]
    if count == 1:
        return [torch.arange(len(groups), device=groups.device)]
    sizes = group_sizes(groups, count).tolist()
    return list(torch.argsort(groups, stable=True).split(sizes))
