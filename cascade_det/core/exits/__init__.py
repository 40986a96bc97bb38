"""Exit rules: which regions leave the cascade before its last stage."""

from cascade_det.core.exits.policy import (
    CONFIDENCES,
    REPORTED_REASONS,
    Decision,
    ExitPolicy,
    build_exits,
)
from cascade_det.core.exits.view import BEFORE_STAGES, Accepted, RegionView

__all__ = [
    "BEFORE_STAGES",
    "CONFIDENCES",
    "REPORTED_REASONS",
    "Accepted",
    "Decision",
    "ExitPolicy",
    "RegionView",
    "build_exits",
]
