"""Exits in production: shadow runs of the full cascade, and an alarm if exits lose more."""

from cascade_det.monitoring.monitor import ExitMonitor
from cascade_det.monitoring.shadow import ShadowEvaluator, ShadowRules

__all__ = ["ExitMonitor", "ShadowEvaluator", "ShadowRules"]
