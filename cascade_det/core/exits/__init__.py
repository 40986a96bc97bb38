"""When regions leave the cascade before its last stage, and what that is decided from."""

from cascade_det.core.exits.policy import ConfidenceExit

__all__ = ["ConfidenceExit"]
