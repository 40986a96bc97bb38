"""Mixed precision."""

from __future__ import annotations

import torch
from torch import Tensor

# By the names of CASCADE.AMP_DTYPE; None is float32.
AMP_DTYPES = {None: None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Compute in ``dtype`` where that is safe; in float32 where ``dtype`` is ``None``."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def channels_last_in_half(images: Tensor) -> Tensor:
    """Channels-last images ``[N, C, H, W]`` for a training in half precision on a GPU.

    Its convolutions read such maps; cuDNN would convert others before and after each of them. In
    float32 and on CPUs the images stay as they are.
    """
    if images.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return images.contiguous(memory_format=torch.channels_last)
    return images
