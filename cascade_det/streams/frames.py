"""What a source yields: frames, and those that are broken."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from cascade_det.data.transforms import Pixels
from cascade_det.data.web_images import WebImage


@runtime_checkable
class Moving(Protocol):
    """A video or a camera, whose frames belong together; ``str()`` is safe to show and to save."""

    @property
    def stem(self) -> str:
        """A name for files, like ``Path.stem``."""

    @property
    def rate(self) -> float:
        """Frames per second in the mean, once it has yielded a frame."""


# Where frames come from.
Origin = Path | WebImage | Moving


@dataclass(frozen=True, eq=False)
class Frame:
    """An image, or a frame of a video.

    Attributes:
        origin: the file, address, video or camera; ``str()`` names it.
        pixels: uint8 ``[H, W, 3]``, BGR.
        number: of the frame in its video, from 0; ``None`` for an image.
        seconds: since the beginning of the video; ``None`` for an image.
    """

    origin: Origin
    pixels: Pixels
    number: int | None = None
    seconds: float | None = None

    @property
    def name(self) -> str:
        """Like ``clip.mp4#17``, or the name of the image."""
        return str(self.origin) if self.number is None else f"{self.origin}#{self.number}"


@dataclass(frozen=True, eq=False)
class BadFrame:
    """A frame or image that cannot be read.

    Attributes:
        origin: as of ``Frame``.
        reason: what is wrong.
        number: as of ``Frame``; ``None`` also where not a single frame, but the rest is broken.
    """

    origin: Origin
    reason: str
    number: int | None = None


class Source(Protocol):
    """A stream of frames.

    Attributes:
        origins: where the frames come from, as far as it is known before.
        live: frames come when they like, so a batch does not wait for more.
    """

    origins: Sequence[Origin]
    live: bool

    @property
    def length(self) -> int | None:
        """The number of frames; ``None`` if unknown."""

    def frames(self) -> Generator[Frame | BadFrame | None, None, None]:
        """Frames in order; ``None`` while there is nothing, so that a caller can stop."""
