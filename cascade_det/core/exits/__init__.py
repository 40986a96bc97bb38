"""When regions leave the cascade before its last stage, and what that is decided from."""

from cascade_det.core.exits.policy import BACKGROUND, COMPLETED, CONFIDENT, STAY, ConfidenceExit

__all__ = ["BACKGROUND", "COMPLETED", "CONFIDENT", "STAY", "ConfidenceExit"]
