"""Pictures of images and videos with detections, and one json; of ONNX files without PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from cascade_det.commands.display import Display
from cascade_det.commands.ending import Ending
from cascade_det.commands.prediction_files import PredictionFolder
from cascade_det.commands.prediction_outputs import Choice, MoreFiles, class_folders, select
from cascade_det.commands.prediction_videos import VideoOutputs
from cascade_det.commands.progress import Progress
from cascade_det.data.coco_results import coco_results, encode_masks
from cascade_det.data.transforms import Pixels
from cascade_det.errors import ConfigError
from cascade_det.onnx_predictor import OnnxPredictor
from cascade_det.parallel.signals import INTERRUPTED, handled, stop_signals
from cascade_det.report.drawing import draw_detections, encode
from cascade_det.report.label_drawing import draw_labels
from cascade_det.streams.frames import BadFrame, Frame, Moving, Source
from cascade_det.streams.pipeline import PartTimes, detect_in
from cascade_det.streams.threads import Worker
from cascade_det.streams.tracking import Tracking
from cascade_det.text import printable

if TYPE_CHECKING:
    from cascade_det.standalone import (
        Predictor,
        SegmenterPredictor,
        SlicedPredictor,
        TilePredictor,
    )

Detecting: TypeAlias = "Predictor | SlicedPredictor | TilePredictor | OnnxPredictor"
AnyPredictor: TypeAlias = "Detecting | SegmenterPredictor"

MOST_SHOWN = 20  # failed files on the terminal


@dataclass(frozen=True)
class Options:
    """What is done with detections.

    Attributes:
        choice: which are kept.
        files: which files are written beside the pictures.
        with_stages: also draw exit stages.
        track: objects get numbers, by the tracker of this name; ``None`` for none.
        show: in a window, see ``check_display``.
        others: names of files that the detector itself writes to the folder.
    """

    choice: Choice = field(default_factory=Choice)
    files: MoreFiles = field(default_factory=MoreFiles)
    with_stages: bool = False
    track: str | None = None
    show: bool = False
    others: Sequence[str] = ()


@dataclass(frozen=True)
class Drawn:
    """What is known of a frame before it is written.

    Attributes:
        picture: uint8 ``[H, W, 3]``, BGR.
        results: detections in COCO's result format; the image id is not set yet.
        labels: the label image of a segmenter.
        more: contents of further files, see ``PredictionFolder.add``.
    """

    picture: Pixels
    results: Sequence[dict[str, Any]] = ()
    labels: Any = None
    more: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)


def predict(
    predictor: Detecting,
    sources: Sequence[Source],
    output: Path,
    options: Options = Options(),
) -> int:
    """Write pictures of all images and videos with their detections, and one ``predictions.json``.

    Args:
        predictor: the detector; a ``TilePredictor`` for pictures with tiles.
        sources: of the images and videos.
        output: folder, made if missing.
        options: what else is done.

    Returns:
        As ``write_predictions``, also errors.

    Raises:
        ConfigError: objects are to be tracked, and there is no video.
    """
    choice, folders = options.choice, class_folders(predictor.class_names)
    if options.track and not any(isinstance(o, Moving) for s in sources for o in s.origins):
        raise ConfigError("--track is for videos and cameras, and there is none in --input")
    tracking = options.track and Tracking(options.track, choice.score_threshold)

    def draw(frame: Frame, stem: str, found: object) -> Drawn:
        kept = choice.kept(found)
        results = coco_results(
            kept, 0, predictor.category_ids, encode_masks(kept, *frame.pixels.shape[:2])
        )
        ids = tracking.of(frame, kept) if tracking and frame.number is not None else None
        if ids is not None:
            for result, number in zip(results, ids, strict=True):
                result |= {} if number is None else {"track_id": number}
        picture = draw_detections(
            frame.pixels,
            kept,
            class_names=predictor.class_names,
            score_threshold=choice.score_threshold,
            with_stages=options.with_stages,
            track_ids=ids,
            tiles=getattr(found, "tiles", None),
        )
        shown = select(kept, choice.shown(kept))
        return Drawn(picture, results, more=options.files.of(frame, stem, shown, folders))

    others = [*options.others, *options.files.names]
    categories = _categories(predictor)
    options.files.check_links(output)
    folder = PredictionFolder(output, _origins(sources), categories, others)
    options.files.remove_older(output)
    names = {category["id"]: category["name"] for category in categories}
    run = _Run(
        folder, draw, show=options.show, finish=lambda: options.files.finish(folder, names, choice)
    )
    monitor = getattr(predictor, "monitor", None)
    exits = monitor.report if monitor is not None and options.with_stages else None
    return run(predictor, sources, exits)


def segment(
    predictor: SegmenterPredictor, sources: Sequence[Source], output: Path, *, show: bool = False
) -> int:
    """Write a picture and a label image of every image, and one ``predictions.json``.

    Args and results as ``predict``; ``show`` as in ``Options``. The label image, a grey PNG, has
    the class of every pixel: 8 bits, or 16 with more than 255 classes. A video gets its pictures
    alone.
    """

    def draw(frame: Frame, stem: str, labels: Any) -> Drawn:
        return Drawn(draw_labels(frame.pixels, labels, predictor.class_names), labels=labels)

    folder = PredictionFolder(output, _origins(sources), _categories(predictor), labels=True)
    return _Run(folder, draw, show=show)(predictor, sources)


class _Run:
    """Writes what a predictor finds, and one ``predictions.json``.

    Frames are read, detected in, drawn and written in a pipeline. Those that cannot be read are
    skipped, reported at the end and listed in the json under ``failed``, as ``{"file_name",
    "reason"}`` and of a video ``"frame"``. So are images of which a file cannot be written; their
    other results are kept. After Ctrl-C or a stop signal the json holds the images done so far.
    During the run they are in ``predictions.jsonl``.

    Args:
        folder: new.
        draw: of a frame, the stem of its files and what was found.
        show: the pictures in a window too.
        finish: called when all is written, before the json is made.
    """

    def __init__(
        self,
        folder: PredictionFolder,
        draw: Callable[[Frame, str, Any], Drawn],
        *,
        show: bool = False,
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder, self._draw, self._finish = folder, draw, finish
        self._display = Display() if show else None
        self._failures: list[str] = []  # the first MOST_SHOWN
        self._times = PartTimes()
        self._dropped = 0

    def __call__(
        self,
        predictor: AnyPredictor,
        sources: Sequence[Source],
        exits: Callable[[], Mapping[str, Any]] | None = None,
    ) -> int:
        """Run it.

        Args:
            predictor: the detector or segmenter.
            sources: of frames.
            exits: metrics of the exits so far, for the progress.

        Returns:
            The exit status: 0, 1 if a file failed, or 128 plus the number of the signal that ended
            the run (130 after Ctrl-C).
        """
        status, ending, folder = None, Ending(), self._folder
        total = _sum([source.length for source in sources])
        with ExitStack() as stack:
            stack.enter_context(handled(dict.fromkeys(stop_signals(), ending.receive)))
            stack.enter_context(folder)
            stack.callback(self._finish)
            videos = stack.enter_context(VideoOutputs(folder, self._note))
            progress = stack.enter_context(Progress(total, self._times, exits))
            stack.enter_context(self._display or nullcontext())
            size = predictor.batch_size
            write: Worker[Any] = Worker(lambda parts: self._write(videos, progress, *parts), size)
            draw: Worker[Any] = Worker(lambda entry: write.put(self._drawn(entry)), size)
            with write, draw:
                try:
                    ending.at_once()
                    self._detect(predictor, sources, draw)
                except KeyboardInterrupt:
                    status = ending.status or INTERRUPTED
                finally:
                    ending.later()
            summary = progress.summary
        print(f"{folder.summary}: {printable(str(folder.path))}\n{summary}")
        for sentence in videos.lost_sounds:
            print(printable(sentence))
        self._tell(status, total)
        return int(folder.failed > 0) if status is None else status

    def _detect(
        self, predictor: AnyPredictor, sources: Sequence[Source], draw: Worker[Any]
    ) -> None:
        for entry in detect_in(
            predictor, sources, times=self._times, on_dropped=self._count_dropped
        ):
            draw.put(entry)
            if self._display is not None and not self._display.refresh():
                return

    def _count_dropped(self, count: int) -> None:
        self._dropped += count

    def _drawn(self, entry: tuple[Frame, Any] | BadFrame) -> tuple[Any, ...]:
        """In the thread that draws."""
        if isinstance(entry, BadFrame):
            return (entry,)
        frame, found = entry
        stem = self._folder.stem_of(frame.origin)
        with self._times.part("draw"):
            drawn = self._draw(frame, stem, found)
        if self._display is not None:
            self._display.newest = drawn.picture
        return frame, stem, drawn

    def _write(
        self,
        videos: VideoOutputs,
        progress: Progress,
        frame: Frame | BadFrame,
        stem: str = "",
        drawn: Drawn | None = None,
    ) -> None:
        """In the thread that writes."""
        with self._times.part("write"):
            if isinstance(frame, BadFrame) or drawn is None:
                assert isinstance(frame, BadFrame)
                self._folder.fail(frame)
                self._note(frame)
            else:
                self._keep(videos, frame, stem, drawn)
        progress.step()

    def _keep(self, videos: VideoOutputs, frame: Frame, stem: str, drawn: Drawn) -> None:
        number, files = self._folder.seen + 1, {}
        results = [{**result, "image_id": number} for result in drawn.results]
        if frame.number is None:
            files["picture"] = lambda: encode(drawn.picture, ".jpg")
            if drawn.labels is not None:
                files["labels"] = lambda: encode(drawn.labels, ".png")
        reason = self._folder.add(frame, stem, results, files, drawn.more)
        if reason is not None:
            self._note(BadFrame(frame.origin, reason, frame.number))
        if frame.number is not None:
            videos.add(frame, stem, drawn.picture)

    def _note(self, bad: BadFrame) -> None:
        if len(self._failures) < MOST_SHOWN:
            at = "" if bad.number is None else f", frame {bad.number}"
            self._failures.append(f"{bad.origin}{at}: {bad.reason}")

    def _tell(self, status: int | None, total: int | None) -> None:
        folder = self._folder
        if self._dropped:
            print(f"{self._dropped} frames came while others were detected in, and were dropped.")
        if status is not None:
            rest = "" if total is None else f" {max(total - folder.seen, 0)} images are not done."
            print(f"Interrupted:{rest}" if rest else "Interrupted.", file=sys.stderr)
        if folder.failed:
            print(
                f"{folder.failed} files could not be read, or their pictures written:",
                file=sys.stderr,
            )
        for failure in self._failures:
            print(f"  - {printable(failure)}", file=sys.stderr)
        if folder.failed > len(self._failures):
            print("  - ... the others are in predictions.json, failed", file=sys.stderr)


def _origins(sources: Iterable[Source]) -> list[Any]:
    return [origin for source in sources for origin in source.origins]


def _sum(lengths: Sequence[int | None]) -> int | None:
    known = [length for length in lengths if length is not None]
    return sum(known) if len(known) == len(lengths) else None


def _categories(predictor: AnyPredictor) -> list[dict[str, Any]]:
    return [
        {"id": category_id, "name": name}
        for category_id, name in zip(predictor.category_ids, predictor.class_names, strict=True)
    ]
