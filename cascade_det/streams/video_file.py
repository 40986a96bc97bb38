"""Writes a video whose frames keep their times, and the sound of the video that they are of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cascade_det.data.transforms import Pixels
from cascade_det.errors import DatasetError
from cascade_det.streams.video import VideoSource, exact_colors, import_av

_CODECS = ("libx264", "mpeg4")  # the first one that PyAV was built with
_QUALITY = {"crf": "20", "preset": "veryfast"}
_TICKS = 90_000  # per second: a multiple of the common rates


class VideoFile:
    """An mp4 file that grows by frames; whole after ``close``.

    Args:
        path: a new file.
        rate: frames per second in the mean, for players; frames come at their own times.

    Raises:
        OSError: the file cannot be written; so do the methods.
    """

    def __init__(self, path: Path, rate: float) -> None:
        self._av = import_av()
        self._path = path
        # A path with a colon is not the address of some protocol.
        self._container = self._av.open(f"file:{path}", "w", format="mp4")
        codec = next(name for name in _CODECS if name in self._av.codecs_available)
        self._stream = self._container.add_stream(
            codec, rate=Fraction(rate).limit_denominator(1001), options=_QUALITY
        )
        self._stream.pix_fmt = "yuv420p"
        self._size: tuple[int, int] | None = None
        self._last = -1

    def add(self, picture: Pixels, seconds: float) -> None:
        """Encode a frame.

        Args:
            picture: uint8 ``[H, W, 3]``, BGR. One of another size than the first is resized to it.
            seconds: since the beginning of the video, after those of the frame before.
        """
        if self._size is None:
            height, width = self._size = picture.shape[:2]
            # The format has no odd sides.
            self._stream.height, self._stream.width = height + height % 2, width + width % 2
            self._stream.codec_context.time_base = Fraction(1, _TICKS)
        if picture.shape[:2] != self._size:
            picture = np.asarray(Image.fromarray(picture).resize(self._size[::-1]))
        even = [(0, side % 2) for side in self._size]
        picture = np.pad(picture, [*even, (0, 0)], mode="edge")
        frame = self._av.VideoFrame.from_ndarray(picture, format="bgr24")
        frame = frame.reformat(format=self._stream.pix_fmt, interpolation=exact_colors())
        self._last = frame.pts = max(self._last + 1, round(seconds * _TICKS))
        frame.time_base = Fraction(1, _TICKS)
        self._encode(frame)

    def close(self) -> None:
        """Write what is left, and the index; the file is complete then."""
        if self._size is not None:
            self._encode(None)
        with self._told():
            self._container.close()

    def abandon(self) -> None:
        """Close a file that cannot be written."""
        with suppress(OSError), self._told():
            self._container.close()

    def _encode(self, frame: Any) -> None:
        with self._told():
            self._container.mux(self._stream.encode(frame))

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except self._av.error.FFmpegError as error:
            raise OSError(error.errno, error.strerror) from None


def add_sound(silent: Path, source: VideoSource, path: Path) -> None:
    """Copy a silent video with the sound of the video that its frames are of.

    The sound is copied as it is, not encoded again; it ends with the pictures.

    Args:
        silent: from ``VideoFile``.
        source: where its frames come from.
        path: a new file.

    Raises:
        DatasetError: the file cannot hold the sound; the new file is of no use.
    """
    av = import_av()
    assert source.file is not None
    try:
        with (
            av.open(f"file:{silent}") as pictures,
            av.open(f"file:{source.file}") as original,
            av.open(f"file:{path}", "w", format="mp4") as target,
        ):
            sound = original.streams.audio[0]
            streams = [
                (pictures, pictures.streams.video[0], 0.0),
                (original, sound, source.start),
            ]
            copies = [target.add_stream_from_template(stream) for _, stream, _ in streams]
            _copy(streams, copies, target)
    except (av.error.FFmpegError, ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DatasetError(f"an mp4 file cannot hold it ({reason})") from None


def has_sound(source: VideoSource) -> bool:
    """Whether a video file has sound.

    Raises:
        DatasetError: it cannot be opened any more.
    """
    av = import_av()
    try:
        with av.open(f"file:{source.file}") as container:
            return bool(container.streams.audio)
    except av.error.FFmpegError as error:
        raise DatasetError(f"{source}: cannot be opened again ({error.strerror})") from None


def _copy(streams: list[tuple[Any, Any, float]], copies: list[Any], target: Any) -> None:
    """Packets of both, in order of time, until the pictures end."""
    pictures, sound = (
        _packets(container, stream, start, copy)
        for (container, stream, start), copy in zip(streams, copies, strict=True)
    )
    heard, end = next(sound, None), 0.0
    for when, packet in pictures:
        while heard is not None and heard[0] <= when:
            target.mux(heard[1])
            heard = next(sound, None)
        # The order of packets is not that of the pictures in them.
        end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        target.mux(packet)
    while heard is not None and heard[0] < end:
        target.mux(heard[1])
        heard = next(sound, None)


def _packets(container: Any, stream: Any, start: float, copy: Any) -> Any:
    """Packets with their second, for the other file."""
    shift = round(start / stream.time_base)
    for packet in container.demux(stream):
        if packet.dts is None:
            continue
        packet.dts -= shift
        if packet.pts is not None:
            packet.pts -= shift
        if packet.dts < 0 and start:
            continue
        packet.stream = copy
        yield float(packet.dts * packet.time_base), packet
