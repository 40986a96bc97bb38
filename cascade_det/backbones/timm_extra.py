"""Trunks that timm computes; it is not installed by default."""

from __future__ import annotations

from cascade_det.errors import ConfigError


def without_timm(trunk: str, error: ImportError) -> ConfigError:
    """What to tell who asks for a trunk where importing timm failed."""
    return ConfigError(
        f"{trunk} is built from timm, which cannot be imported ({error}): pip install timm, the "
        "extra [timm] of cascade_det"
    )
