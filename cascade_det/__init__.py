"""Cascade R-CNN with confidence-gated early exits, as a Detectron2 plugin and on its own."""

__version__ = "0.2.0"
