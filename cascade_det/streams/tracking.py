"""Numbers of objects in videos, by the package trackers."""

from __future__ import annotations

from typing import Any

import numpy as np

from cascade_det.errors import ConfigError
from cascade_det.onnx_predictor import ArrayDetections
from cascade_det.streams.frames import Frame, Origin

TRACKERS = ("bytetrack", "sort")  # the first is the default
# ByteTrack also follows objects by detections of low scores, down to this one.
_LEAST_SCORE = 0.1


class Tracking:
    """Follows the objects of one video after the other; numbers begin at 0 in each.

    Args:
        name: one of ``TRACKERS``.
        score_threshold: a new object needs this score.

    Raises:
        ConfigError: the package is not installed.
    """

    def __init__(self, name: str, score_threshold: float) -> None:
        try:
            import supervision
            import trackers
        except ImportError:
            raise ConfigError(
                "--track needs the package trackers, which is not installed: "
                "pip install 'cascade_det[track]'. It brings opencv-python, which takes the place "
                "of opencv-python-headless."
            ) from None
        self._supervision, self._trackers = supervision, trackers
        self._name, self._threshold = name, score_threshold
        self._origin: Origin | None = None
        self._tracker: Any = None

    def of(self, frame: Frame, detections: ArrayDetections) -> list[int | None]:
        """The number of the object of each detection; ``None`` while it is not sure of one.

        Args:
            frame: of a video, after the frames before.
            detections: in this frame.
        """
        if frame.origin is not self._origin:
            self._origin, self._tracker = frame.origin, self._new(float(frame.origin.rate))  # type: ignore[union-attr]
        least = min(_LEAST_SCORE, self._threshold) if self._name == "bytetrack" else self._threshold
        rows = np.flatnonzero(detections.scores >= least)
        given = self._supervision.Detections(
            xyxy=detections.boxes[rows].astype(np.float64).reshape(-1, 4),
            confidence=detections.scores[rows],
            class_id=detections.classes[rows],
            data={"row": rows},  # the tracker changes the order
        )
        tracked = self._tracker.update(given, timestamp=frame.seconds)
        numbers: list[int | None] = [None] * len(detections)
        if len(tracked):
            for row, number in zip(tracked.data["row"], tracked.tracker_id, strict=True):
                numbers[int(row)] = None if number < 0 else int(number)
        return numbers

    def _new(self, rate: float) -> Any:
        common = {"frame_rate": rate, "track_activation_threshold": self._threshold}
        if self._name == "sort":
            return self._trackers.SORTTracker(**common)
        return self._trackers.ByteTrackTracker(high_conf_det_threshold=self._threshold, **common)
