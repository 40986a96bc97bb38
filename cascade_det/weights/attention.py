"""Weights of attention that fit another window or kernel than the model's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt

from torch import Tensor
from torch.nn import functional as F

Shape = tuple[int, ...]

# EfficientViT's convolution of a head's queries, [16, 1, k, k].
_KERNEL = re.compile(r"(?:^|\.)attn\.dws\.(\d+)\.c\.weight$")


def differs_in_window(name: str, in_file: Shape, in_model: Shape) -> bool:
    """Whether two shapes are ``[heads, a^2]`` and ``[heads, b^2]`` of a table of attention biases.

    Its entries are the offsets (row, column) between two tokens of a window.
    """
    return (
        name.rpartition(".")[2] == "attention_biases"
        and len(in_file) == len(in_model) == 2
        and in_file[0] == in_model[0]
        and in_file[1] != in_model[1]
        and all(0 < entries == isqrt(entries) ** 2 for entries in (in_file[1], in_model[1]))
    )


def resize_biases(table: Tensor, entries: int) -> Tensor:
    """A table of attention biases for a window of another side, as EfficientViT's detectors do.

    The grid of offsets is stretched, not continued: 3, the largest offset of a window of 4,
    becomes 6, that of a window of 7 (arXiv 2305.07027).

    Args:
        table: ``[heads, a^2]``, of any type.
        entries: b^2.

    Returns:
        ``[heads, b^2]``, float64: bicubic interpolation, without aligned corners.
    """
    side, new_side = isqrt(table.shape[1]), isqrt(entries)
    grid = table.double().view(1, -1, side, side)
    size = (new_side, new_side)
    return F.interpolate(grid, size=size, mode="bicubic", align_corners=False).view(-1, entries)


def differs_in_kernel(name: str, in_file: Shape, in_model: Shape) -> bool:
    """Whether two shapes are those of EfficientViT's convolution of queries with other kernels."""
    square = len(in_file) == len(in_model) == 4 and in_file[2] == in_file[3]
    return bool(_KERNEL.search(name)) and square and in_file[:2] == in_model[:2]


def kernels_of(weights: Mapping[str, Tensor]) -> list[int]:
    """``MODEL.EFFICIENTVIT.KERNELS`` of a file, one per head; empty if its stages have others.

    Where no stage has four heads, nothing reads the last kernels.
    """
    found = {
        (int(head[1]), tuple(value.shape[2:]))
        for name, value in weights.items()
        if (head := _KERNEL.search(name))
    }
    kernels = {head: shape[0] for head, shape in found if len({*shape}) == 1}
    shared = len(kernels) == len(found) and kernels.keys() == {*range(len(kernels))}
    return [kernels[min(head, len(kernels) - 1)] for head in range(4)] if shared else []
