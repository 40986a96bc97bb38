"""When regions leave the cascade before its last stage, and what that is decided from."""

from cascade_det.core.exits.policy import CONFIDENCES, KEPT, Decision, ExitPolicy, build_exits
from cascade_det.core.exits.view import BEFORE_STAGES, Accepted, RegionView

__all__ = [
    "BEFORE_STAGES",
    "CONFIDENCES",
    "KEPT",
    "Accepted",
    "Decision",
    "ExitPolicy",
    "RegionView",
    "build_exits",
]
