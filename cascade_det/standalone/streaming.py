"""Detections in the frames of a stream, with their frames."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from cascade_det.core import Detections
from cascade_det.streams.frames import BadFrame, Frame, Source
from cascade_det.streams.pipeline import FramePredictor, detect_in

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class FrameDetections(Detections):
    """The detections of a frame, best score first.

    Attributes:
        frame: its ``pixels`` (uint8 ``[H, W, 3]``, BGR) and ``name``, and of a video its
            ``number`` and ``seconds``.
    """

    frame: Frame

    def _map(self, change: Callable[[Tensor], Tensor]) -> FrameDetections:
        columns = {name: x for name, x in vars(self).items() if name != "frame"}
        return FrameDetections(**vars(Detections(**columns)._map(change)), frame=self.frame)


def stream_detections(
    predictor: FramePredictor, sources: Iterable[Source]
) -> Iterator[FrameDetections]:
    """What ``detect_in`` finds; frames that cannot be read are warnings in the log."""
    for entry in detect_in(predictor, sources, on_dropped=_tell_dropped):
        if isinstance(entry, BadFrame):
            at = "" if entry.number is None else f", frame {entry.number}"
            logger.warning("%s%s: %s; it is left out", entry.origin, at, entry.reason)
        else:
            frame, detections = entry
            yield FrameDetections(**vars(detections), frame=frame)


def _tell_dropped(count: int) -> None:
    logger.info("%d frames came while others were detected in, and were dropped", count)
