"""Logits of the levels of a decoder, summed to a prediction.

The prediction is the sum of all logits ("Medical Image Segmentation via Cascaded Attention
Decoding", WACV 2023, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F


def resize(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """``[N, K, H_l, W_l]`` to ``[N, K, *size]``, bilinearly, corners not aligned."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def predict(logits: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """The sum of the logits of all levels ``[N, K, H_l, W_l]``, each resized to ``size``."""
    total = resize(logits[0], size)
    for finer in logits[1:]:
        total = total + resize(finer, size)
    return total
