"""Detectron2's checkpointer without pickle execution and without half-written files."""

from __future__ import annotations

from detectron2.checkpoint import DetectionCheckpointer

from cascade_det.engine import checkpoint


class Checkpointer(checkpoint.Checkpointer, DetectionCheckpointer):
    """``DetectionCheckpointer`` with the restricted reader and the atomic writer of the engine.

    Arguments and errors are those of :class:`cascade_det.engine.checkpoint.Checkpointer`; the files
    are what ``DetectionCheckpointer`` reads and writes.
    """
