"""Exits in production: shadow runs of the full cascade, and an alarm if exits lose more."""
