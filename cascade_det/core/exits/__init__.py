"""Exit rules: which regions leave the cascade before its last stage."""

from cascade_det.core.exits.policy import REPORTED_REASONS, ExitPolicy, build_exits
from cascade_det.core.exits.view import BEFORE_STAGES, RegionView

__all__ = [
    "BEFORE_STAGES",
    "REPORTED_REASONS",
    "ExitPolicy",
    "RegionView",
    "build_exits",
]
