"""Detection in a stream: frames are read in one thread while the caller's detects in others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from typing import Any, Protocol, TypeVar

from cascade_det.data.transforms import Pixels
from cascade_det.streams.frames import BadFrame, Frame, Source
from cascade_det.streams.threads import Background

_Item = TypeVar("_Item")


class FramePredictor(Protocol):
    """A detector or a segmenter, such as ``Predictor`` and ``OnnxPredictor``.

    Attributes:
        batch_size: images that run at once.
    """

    batch_size: int

    def __call__(self, images: Any, *, names: Any) -> Any:
        """One result for each of a list of images."""


class PartTimes:
    """Seconds that the parts of a pipeline took so far; threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the block to a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                elapsed = time.perf_counter() - start
                self._seconds[name] = self._seconds.get(name, 0.0) + elapsed

    def milliseconds(self, count: int) -> dict[str, float]:
        """By part, for each of ``count`` frames."""
        with self._lock:
            return {name: 1000 * x / max(count, 1) for name, x in self._seconds.items()}


def detect_in(
    predictor: FramePredictor,
    sources: Iterable[Source],
    *,
    times: PartTimes | None = None,
    on_dropped: Callable[[int], None] = lambda count: None,
) -> Iterator[tuple[Frame, Any] | BadFrame]:
    """Frames in order with what the predictor finds in each, and those that cannot be read.

    At most two batches of frames are in memory beside the one that runs. Frames of a live source
    that come while the predictor is busy are dropped: the newest one is next.

    Args:
        predictor: runs in the caller's thread.
        sources: one after the other.
        times: gets the parts ``read`` and ``detect``.
        on_dropped: called after a live source with the number of its dropped frames.
    """
    times = times or PartTimes()
    for source in sources:
        # A camera keeps only its newest frame; all files that appear in a folder are wanted.
        newest = source.live and bool(source.origins)
        size = 1 if source.live else predictor.batch_size
        # Reading from a live source is waiting for it.
        items = source.frames() if source.live else _timed(source.frames(), times)
        background: Background[Frame | BadFrame] = Background(
            items, 1 if newest else size, newest=newest
        )
        try:
            with background as frames:
                for batch in _batches(frames, size):
                    yield from _detect(predictor, batch, times)
        finally:
            if background.dropped:
                on_dropped(background.dropped)


def _detect(
    predictor: FramePredictor, batch: Sequence[Frame | BadFrame], times: PartTimes
) -> Iterator[tuple[Frame, Any] | BadFrame]:
    frames = [frame for frame in batch if isinstance(frame, Frame)]
    images: list[Pixels] = [frame.pixels for frame in frames]
    with times.part("detect"):
        found = iter(predictor(images, names=[f.name for f in frames]) if frames else ())
    for frame in batch:
        yield frame if isinstance(frame, BadFrame) else (frame, next(found))


def _timed(items: Generator[_Item, None, None], times: PartTimes) -> Iterator[_Item]:
    with closing(items):
        while True:
            with times.part("read"):
                item = next(items, _END)
            if item is _END:
                return
            yield item


_END: Any = object()


def _batches(items: Iterator[_Item], size: int) -> Iterator[list[_Item]]:
    while batch := list(islice(items, size)):
        yield batch
