"""Convolutions with norms, under Detectron2's names, for all parts of a detector.

``folding`` and ``winograd`` make them faster for inference, ``training_conv`` for training.
"""

from cascade_det.layers.conv_norm import (
    NORMS,
    ConvNorm,
    FrozenBatchNorm2d,
    add_convolved,
    freeze,
    make_norm,
    may_write_in_place,
)

__all__ = [
    "NORMS",
    "ConvNorm",
    "FrozenBatchNorm2d",
    "add_convolved",
    "freeze",
    "make_norm",
    "may_write_in_place",
]
