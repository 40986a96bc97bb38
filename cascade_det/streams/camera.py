"""Frames of a camera of this machine, read by OpenCV."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any

import cv2

from cascade_det.errors import DatasetError
from cascade_det.streams.frames import BadFrame, Frame

_RATE = 30.0  # frames per second, where a camera does not say it


class CameraSource:
    """A camera, until it is taken away; ``str()`` is like ``camera 0``.

    Args:
        index: of the camera, from 0.
        clock: seconds; for tests.

    Raises:
        DatasetError: there is no such camera, or another program uses it.
    """

    live = True
    length = None

    def __init__(self, index: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._index, self._clock = index, clock
        self.origins = (self,)
        # OpenCV's numbers have 32 bits.
        self._capture: Any = cv2.VideoCapture(index) if index < 2**31 else None
        if self._capture is None or not self._capture.isOpened():
            raise DatasetError(
                f"--input {index}: there is no camera of this number, or another program uses it"
            )
        self.rate = float(self._capture.get(cv2.CAP_PROP_FPS) or _RATE)

    def __str__(self) -> str:
        return f"camera {self._index}"

    @property
    def stem(self) -> str:
        """A name for files."""
        return f"camera_{self._index}"

    def frames(self) -> Generator[Frame | BadFrame, None, None]:
        """Frames as they come."""
        start, number = self._clock(), 0
        try:
            while True:
                there, pixels = self._capture.read()
                if not there:
                    yield BadFrame(self, "gives no more frames")
                    return
                yield Frame(self, pixels, number, self._clock() - start)
                number += 1
        finally:
            self._capture.release()
