"""Convolutions with their norm, as every part of a detector uses them; named as in Detectron2.

What inference makes of them is in ``folding`` and ``winograd``.
"""

from cascade_det.layers.conv_norm import (
    NORMS,
    ConvNorm,
    FrozenBatchNorm2d,
    add_convolved,
    freeze,
    group_norm,
    make_norm,
    may_write_in_place,
)

__all__ = [
    "NORMS",
    "ConvNorm",
    "FrozenBatchNorm2d",
    "add_convolved",
    "freeze",
    "group_norm",
    "make_norm",
    "may_write_in_place",
]
