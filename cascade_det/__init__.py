"""Cascade R-CNN with confidence-gated early exits, as a Detectron2 plugin and on its own."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cascade_det.facade import CascadeDetector

__version__ = "0.2.0"
__all__ = ["CascadeDetector", "__version__"]


def __getattr__(name: str) -> Any:
    # PyTorch is loaded with the first use, not by `import cascade_det`.
    if name == "CascadeDetector":
        return importlib.import_module("cascade_det.facade").CascadeDetector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
