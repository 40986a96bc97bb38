"""A window with the newest picture of a run."""

from __future__ import annotations

import os
import sys
from typing import Any

import cv2

from cascade_det.data.transforms import Pixels
from cascade_det.errors import ConfigError

_WINDOW = "cascade-det predict"
_QUIT = (27, ord("q"))  # Escape


def check_display() -> None:
    """Check that OpenCV can open a window.

    Raises:
        ConfigError: it was built without windows, or there is no display.
    """
    lines = (line.split(":") for line in cv2.getBuildInformation().splitlines())
    if any(line[0].strip() == "GUI" and line[1].strip() in ("", "NONE") for line in lines):
        raise ConfigError(
            "--show needs an OpenCV with windows, and opencv-python-headless has none: "
            "pip uninstall opencv-python-headless, then pip install opencv-python"
        )
    if sys.platform == "linux" and not (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    ):
        raise ConfigError("--show needs a display, and neither DISPLAY nor WAYLAND_DISPLAY is set")


class Display:
    """The window; a context manager.

    Attributes:
        newest: the picture that ``refresh`` shows, set by any thread.
    """

    def __init__(self) -> None:
        self.newest: Pixels | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: Any) -> None:
        cv2.destroyAllWindows()

    def refresh(self) -> bool:
        """Show the newest picture, from the main thread; false once Escape or q was pressed."""
        picture, self.newest = self.newest, None
        if picture is not None:
            cv2.imshow(_WINDOW, picture)
        return cv2.waitKey(1) & 0xFF not in _QUIT
