"""Frames of video files and of network streams, read by PyAV."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from cascade_det.data.transforms import Pixels
from cascade_det.data.web_images import is_web_address, stem_of, without_credentials
from cascade_det.errors import ConfigError, DatasetError
from cascade_det.streams.frames import BadFrame, Frame

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
_STREAM_SUFFIXES = (*VIDEO_SUFFIXES, ".m3u8", ".mjpeg", ".mjpg", ".mpd", ".ts")
_PREFIX = "video+"
_STREAM = re.compile("(rtsp|rtsps)://", re.IGNORECASE)
_DURATION = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")
_TIMEOUT = 20.0  # seconds without data from a server
_LONGEST_GAP = 1.0  # seconds that a file may be shorter than it says
_MOST_BROKEN = 1000  # packets in a row, of a file that is no video beyond some point


def import_av() -> Any:
    """PyAV.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import av
    except ImportError:
        raise ConfigError(
            "videos are read and written by PyAV, which is not installed: "
            "pip install 'cascade_det[video]'"
        ) from None
    return av


def exact_colors() -> Any:
    """How colours are converted: the default of FFmpeg is 2 to 3 grey levels off."""
    kinds = import_av().video.reformatter.Interpolation
    return kinds.BICUBIC | kinds.ACCURATE_RND | kinds.FULL_CHR_H_INT


def is_stream_address(text: str) -> bool:
    """Whether a text is the address of a video: rtsp://, video+http://, or http://….mp4."""
    if _STREAM.match(text):
        return True
    marked = text.startswith(_PREFIX)
    address = text.removeprefix(_PREFIX)
    path = address.partition("?")[0].partition("#")[0].lower()
    return is_web_address(address) and (marked or path.endswith(_STREAM_SUFFIXES))


class VideoSource:
    """A video file, or a stream of a server; ``str()`` is its path or its address.

    Args:
        place: a path, or an address for which ``is_stream_address`` is true.

    Attributes:
        file: the path; ``None`` of a stream.
        start: seconds in the time of the file that are second 0 here.

    Raises:
        ConfigError: PyAV is not installed.
    """

    def __init__(self, place: Path | str) -> None:
        self._av = import_av()
        self.file = place if isinstance(place, Path) else None
        self._address = "" if isinstance(place, Path) else place.removeprefix(_PREFIX)
        self.live = _STREAM.match(self._address) is not None
        self.origins = (self,)
        self.start = 0.0
        self.rate = 25.0
        self.length: int | None = None
        # One that is broken is told when it is its turn, as an image is.
        if self.file is not None:
            with suppress(DatasetError), self._open() as container:
                self._describe(container, self._video_of(container))

    def __str__(self) -> str:
        return without_credentials(self._address) if self.file is None else str(self.file)

    @property
    def stem(self) -> str:
        """Like ``Path.stem``."""
        return stem_of(self._address) if self.file is None else self.file.stem

    def frames(self) -> Generator[Frame | BadFrame | None, None, None]:
        """Upright frames in order of time.

        A packet that cannot be decoded is a ``BadFrame``, and so is a file or a stream that cannot
        be opened or breaks off.
        """
        number, seconds, end = 0, -np.inf, 0.0
        try:
            with self._open() as container:
                stream = self._video_of(container)
                self._describe(container, stream)
                for decoded in self._decoded(container, stream):
                    if decoded is None or decoded.is_corrupt:
                        yield BadFrame(self, "the frame is broken", number)
                    else:
                        seconds = self._time_of(decoded, number, seconds)
                        end = seconds + float((decoded.duration or 0) * decoded.time_base)
                        yield Frame(self, _pixels(decoded), number, seconds)
                    number += 1
                self._check_end(end, container, stream)
        except DatasetError as error:
            yield BadFrame(self, str(error).removeprefix(f"{self}: "))

    def _time_of(self, decoded: Any, number: int, before: float) -> float:
        """Its second, after that of the frame before; by the mean rate if it has none."""
        when = number / self.rate if decoded.time is None else float(decoded.time) - self.start
        return when if when > before else before + 0.5 / self.rate

    def _check_end(self, end: float, container: Any, stream: Any) -> None:
        """Raise DatasetError if a file is shorter than it says."""
        if self.file is None or container.duration is None:
            return
        whole = container.duration / self._av.time_base
        if stream.duration is not None:
            whole = min(whole, float(stream.duration * stream.time_base))
        elif tagged := _DURATION.match(stream.metadata.get("DURATION", "")):
            # Matroska and WebM; counted from 0, wherever the first frame is.
            hours, minutes, seconds = map(float, tagged.groups())
            whole = min(whole, 3600 * hours + 60 * minutes + seconds) - self.start
        elif len(container.streams) > 1:
            return  # the sound may be longer
        if end < whole - _LONGEST_GAP:
            raise DatasetError(f"{self}: ends after {end:.1f} of {whole:.1f} s: it is cut off")

    def _open(self) -> Any:
        # A path with a colon is not the address of some protocol.
        name = self._address if self.file is None else f"file:{self.file}"
        options = {"rtsp_transport": "tcp"} if self.live else {}
        timeout = None if self.file is not None else (_TIMEOUT, _TIMEOUT)
        try:
            return self._av.open(name, options=options, timeout=timeout)
        except (self._av.error.FFmpegError, OSError, ValueError) as error:
            raise self._broken("cannot be opened as a video", error) from None

    def _video_of(self, container: Any) -> Any:
        if not container.streams.video:
            raise DatasetError(f"{self}: has no video in it")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        return stream

    def _describe(self, container: Any, stream: Any) -> None:
        if container.start_time is not None and container.start_time > 0:
            self.start = container.start_time / self._av.time_base
        self.rate = float(stream.average_rate or stream.guessed_rate or self.rate)
        self.length = stream.frames or None

    def _decoded(self, container: Any, stream: Any) -> Iterator[Any]:
        """Decoded frames; ``None`` for a packet without one because it is broken."""
        error_type, broken = self._av.error.FFmpegError, 0
        packets = container.demux(stream)
        while broken < _MOST_BROKEN:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except error_type as error:
                raise self._broken("ends here", error) from None
            try:
                frames = packet.decode()
            except error_type:
                broken += 1
                yield None
                continue
            broken = 0 if frames else broken
            yield from frames
        raise DatasetError(f"{self}: {_MOST_BROKEN:,} packets in a row are broken: no more is read")

    def _broken(self, what: str, error: Exception) -> DatasetError:
        # Not the text of the error, which has the address with its password.
        reason = getattr(error, "strerror", None) or type(error).__name__
        return DatasetError(f"{self}: {what} ({reason})")


def _pixels(frame: Any) -> Pixels:
    """Upright pixels, as a player shows them."""
    pixels = frame.to_ndarray(format="bgr24", interpolation=exact_colors())
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels
