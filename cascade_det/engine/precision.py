"""Mixed precision."""

from __future__ import annotations

import torch

# By the names of CASCADE.AMP_DTYPE; None is float32.
AMP_DTYPES = {None: None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Compute in ``dtype`` where that is safe; in float32 where ``dtype`` is ``None``."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
