"""The videos of one run of ``predict``, one at a time, each written whole."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress

from cascade_det.commands.earlier_predictions import SUFFIXES
from cascade_det.commands.prediction_files import PredictionFolder
from cascade_det.data.transforms import Pixels
from cascade_det.errors import DatasetError
from cascade_det.files import atomic_path
from cascade_det.streams.frames import BadFrame, Frame, Moving, Origin
from cascade_det.streams.video import VideoSource
from cascade_det.streams.video_file import VideoFile, add_sound, has_sound


class VideoOutputs:
    """Videos of the pictures of frames; a context manager.

    A video is under a temporary name until its last frame, then whole, with the sound of the
    original where an mp4 file can hold it. If the run is interrupted, the video ends there.

    Args:
        folder: the videos are in it, and recorded by it.
        on_failure: called with each video that cannot be written.

    Attributes:
        lost_sounds: sentences about videos without the sound of the original.
    """

    def __init__(self, folder: PredictionFolder, on_failure: Callable[[BadFrame], None]) -> None:
        self._folder, self._on_failure = folder, on_failure
        self.lost_sounds: list[str] = []
        self._origin: Origin | None = None
        self._stack = ExitStack()
        self._file: VideoFile | None = None
        self._name, self._frames = "", 0

    def __enter__(self) -> VideoOutputs:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def add(self, frame: Frame, stem: str, picture: Pixels) -> None:
        """Add the picture of a frame to its video; ends that of the origin before."""
        if frame.origin is not self._origin:
            self._end()
            self._begin(frame.origin, stem + SUFFIXES["video"])
        if self._file is None:
            return
        try:
            self._file.add(picture, frame.seconds or 0.0)
            self._frames += 1
        except OSError as error:
            self._give_up(frame.origin, error)

    def _begin(self, origin: Origin, name: str) -> None:
        assert isinstance(origin, Moving)
        self._origin, self._name, self._frames = origin, name, 0
        try:
            temporary = self._stack.enter_context(atomic_path(self._folder.path / name))
            self._file = VideoFile(temporary, origin.rate)
        except OSError as error:
            self._give_up(origin, error)

    def _give_up(self, origin: Origin, error: OSError) -> None:
        """Go on without the video."""
        file, self._file = self._file, None
        if file is not None:
            file.abandon()
        stack, self._stack = self._stack, ExitStack()
        with suppress(OSError):
            stack.__exit__(type(error), error, None)  # removes the temporary file
        bad = BadFrame(origin, f"no video: {self._name}: {error.strerror or error}")
        self._folder.fail(bad, counted=False)
        self._on_failure(bad)

    def _end(self) -> None:
        origin, self._origin = self._origin, None
        if self._file is None or origin is None:
            return
        try:
            self._file.close()
            self._stack.close()
        except OSError as error:
            self._give_up(origin, error)
            return
        self._file = None
        self._folder.add_video(origin, self._name, self._frames)
        if isinstance(origin, VideoSource):
            self._add_sound(origin)

    def _add_sound(self, source: VideoSource) -> None:
        path = self._folder.path / self._name
        try:
            if source.file is None:
                raise DatasetError("that of a stream is not recorded")
            if has_sound(source):
                with atomic_path(path) as temporary:
                    add_sound(path, source, temporary)
        except (DatasetError, OSError) as error:
            self.lost_sounds.append(f"{source}: the sound is lost: {error}")
