"""Detectron2's checkpointer with restricted unpickling and atomic writes."""

from __future__ import annotations

from detectron2.checkpoint import DetectionCheckpointer

from cascade_det.engine import checkpoint


class Checkpointer(checkpoint.Checkpointer, DetectionCheckpointer):
    """``DetectionCheckpointer`` with the restricted reader and the atomic writer of the engine.

    Arguments and errors as in :class:`cascade_det.engine.checkpoint.Checkpointer`; the files are
    those of ``DetectionCheckpointer``.
    """
