"""Mixed precision: names of types, and autocast."""

from __future__ import annotations

import torch

from cascade_det.errors import ConfigError

_AMP_DTYPES: dict[torch.dtype | str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    torch.bfloat16: torch.bfloat16,
    "float16": torch.float16,
    torch.float16: torch.float16,
}


def amp_dtype_of(name: torch.dtype | str | None) -> torch.dtype | None:
    """The type of mixed precision by its name; ``None``, which is float32, stays.

    Raises:
        ConfigError: it is not bfloat16, float16 or ``None``.
    """
    if name is None:
        return None
    if name not in _AMP_DTYPES:
        raise ConfigError(
            f"CASCADE.AMP_DTYPE: {name!r} is no type of mixed precision; bfloat16 and float16 are."
        )
    return _AMP_DTYPES[name]


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Compute in ``dtype`` where that is safe; in float32 where ``dtype`` is ``None``."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
