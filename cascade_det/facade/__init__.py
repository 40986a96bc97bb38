"""One object for a detector: opened by name, used, trained, evaluated and shared."""

from cascade_det.facade.detector import CascadeDetector

__all__ = ["CascadeDetector"]
