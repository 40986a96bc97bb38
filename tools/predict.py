#!/usr/bin/env python3
"""Detect objects in images: annotated pictures and a COCO-format json with exit stages.

python tools/predict.py --config-file ... --input photo.jpg 'folder/*.png' folder --output out \
    --opts MODEL.WEIGHTS output/model_final.pth
python tools/predict.py --onnx model.onnx --input folder --output out   # a file of tools/export.py
"""

from __future__ import annotations

import argparse
import functools
import glob
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from cascade_det.commands.arguments import add_config_options, real

if TYPE_CHECKING:
    from cascade_det.standalone import Predictor


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Detect objects in images.")
    detector = parser.add_mutually_exclusive_group(required=True)
    detector.add_argument(
        "--config-file", action="append", metavar="YAML", help="of weights; later ones on top"
    )
    detector.add_argument("--onnx", metavar="FILE", help="of tools/export.py; needs nothing else")
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        help="image files, folders or quoted globs; a name that exists is no glob",
    )
    parser.add_argument("--output", required=True, help="folder for pictures and predictions.json")
    parser.add_argument(
        "--score-threshold", type=real(0, 1), default=0.5, help="of what is drawn (0.5)"
    )
    add_config_options(parser)
    args = parser.parse_args(argv)
    if args.onnx and args.opts:
        parser.error("--opts change a configuration, which an ONNX file (--onnx) has no need of")
    return args


if __name__ == "__main__":
    _parse(None)  # Help and errors do not wait for the imports below.


import numpy as np
from tqdm import tqdm

from cascade_det.commands.errors import without_traceback
from cascade_det.commands.prediction_files import PredictionFolder
from cascade_det.data.coco_results import coco_results
from cascade_det.data.read_ahead import read_ahead
from cascade_det.data.transforms import read_image
from cascade_det.errors import DatasetError
from cascade_det.onnx_predictor import ArrayDetections, OnnxPredictor
from cascade_det.parallel.processes import INTERRUPTED
from cascade_det.parallel.signals import handled, let_go_of_lost_terminal, stop_signals
from cascade_det.report.drawing import draw_detections, encode
from cascade_det.text import printable

# What needs PyTorch is imported where it is used: an ONNX file runs without it.

MOST_TOLD = 20  # failed files on the terminal
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


@without_traceback
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status.

    It is 1 if a file failed, and after Ctrl-C or a signal 128 and its number.
    """
    args = _parse(argv)
    files = find_images(args.input)
    output = Path(args.output)
    if args.onnx:
        return predict(OnnxPredictor(args.onnx), files, output, args.score_threshold)
    return _predict_by_weights(args, files, output)


def _predict_by_weights(args: argparse.Namespace, files: list[Path], output: Path) -> int:
    from cascade_det.config import check_config, exit_arguments, load_config
    from cascade_det.engine.log import setup_logging
    from cascade_det.monitoring.monitor import METRICS_FILE
    from cascade_det.report.text import format_report
    from cascade_det.standalone import Predictor

    setup_logging()
    cfg = load_config(args.config_file, args.opts)
    check_config(cfg)
    watched = cfg.CASCADE.SHADOW_SHARE > 0
    predictor = Predictor(cfg, metrics_dir=output if watched else None)
    with predictor.monitor as monitor:
        exits = exit_arguments(cfg) is not None
        status = predict(
            *(predictor, files, output, args.score_threshold),
            with_stages=exits,
            others=[METRICS_FILE] if watched else [],
        )
        if watched:
            print(format_report(monitor.report()))
    return status


def find_images(patterns: list[str]) -> list[Path]:
    """Files, the images of folders, and what globs match; in order, each once.

    What exists under the given name is taken as it is, brackets and all, and so are folders at the
    beginning of a glob.

    Raises:
        DatasetError: if a pattern gives no image.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        paths = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(_escaped(path)))]
        images = [image for path in paths for image in _images_at(path)]
        if not images:
            raise DatasetError(
                f"--input {pattern}: is neither an existing file nor a folder with images"
            )
        found.update(dict.fromkeys(images))
    return list(found)


def _escaped(path: Path) -> str:
    """A glob whose first folders, as far as they exist, mean themselves."""
    folder = next((parent for parent in path.parents if parent.exists()), Path())
    return os.path.join(glob.escape(str(folder)), path.relative_to(folder))


def predict(
    predictor: Predictor | OnnxPredictor,
    files: list[Path],
    output: Path,
    score_threshold: float,
    *,
    with_stages: bool = False,
    others: Sequence[str] = (),
) -> int:
    """Write a picture for every image, and ``predictions.json`` for all of them.

    A file that cannot be read is left out and told at the end, in the json as well: ``failed`` is
    a list of ``{"file_name", "reason"}``. An image whose picture cannot be written is there too,
    and its detections are kept. After Ctrl-C, or a signal that ends the run, the json has the
    images that were done; while it runs, they are in ``predictions.jsonl``.

    Args:
        predictor: the detector.
        files: image files; an image's id is its place among them, from 1 on.
        output: folder, made if missing.
        score_threshold: detections below it are in the json, but not drawn.
        with_stages: draw the exit stages too.
        others: names of the files that the detector itself writes in the folder.

    Returns:
        The exit status: 0, 1 if a file failed, or after Ctrl-C or a signal 128 and its number.

    Raises:
        DatasetError: a picture would replace an input, or a file that no earlier run made.
    """
    categories = [
        {"id": category_id, "name": name}
        for category_id, name in zip(predictor.category_ids, predictor.class_names, strict=True)
    ]
    failures: list[str] = []  # the first of them
    status, ending = None, _Ending()
    with (
        handled(dict.fromkeys(stop_signals(), ending.receive)),
        PredictionFolder(output, files, categories, others) as folder,
    ):
        results = tqdm(_detect(predictor, files), total=len(files), disable=None, unit="img")
        draw = functools.partial(
            _draw, predictor.class_names, score_threshold=score_threshold, with_stages=with_stages
        )
        try:
            ending.at_once()
            for number, found in enumerate(results):
                reason = _keep(folder, number, found, predictor.category_ids, draw)
                if reason is not None and len(failures) < MOST_TOLD:
                    failures.append(f"{files[number]}: {reason}")
        except KeyboardInterrupt:
            status = ending.status or INTERRUPTED
        finally:
            ending.later()
    print(f"{folder.done} images, {folder.detections} detections: {printable(str(output))}")
    if status is not None:
        print(f"Interrupted: {len(files) - folder.seen} images are not done.", file=sys.stderr)
    _tell(failures, folder.failed)
    return int(folder.failed > 0) if status is None else status


def _keep(
    folder: PredictionFolder,
    number: int,
    found: tuple[np.ndarray, ArrayDetections] | DatasetError,
    category_ids: Sequence[int],
    draw: Callable[[np.ndarray, ArrayDetections], bytes],
) -> str | None:
    """Write what was found in an image; returns what failed."""
    if isinstance(found, DatasetError):
        reason = str(found).removeprefix(f"{folder.files[number]}: ")
        folder.fail(number, reason)
        return reason
    image, detections = found
    results = coco_results(detections, number + 1, category_ids)
    height, width = image.shape[:2]
    return folder.add(number, (height, width), results, lambda: draw(image, detections))


def _draw(
    class_names: Sequence[str], image: np.ndarray, detections: ArrayDetections, **options: Any
) -> bytes:
    return encode(draw_detections(image, detections, class_names, **options), ".jpg")


class _Ending:
    """Whether a signal came that ends the run; a second Ctrl-C is a KeyboardInterrupt anywhere.

    Attributes:
        status: of the command after the first signal; ``None`` before.
    """

    def __init__(self) -> None:
        self.status: int | None = None
        self._at_once = False

    def receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            let_go_of_lost_terminal()
        first, self.status = self.status is None, self.status or 128 + number
        # Other signals may come several times for one and the same wish.
        if (first and self._at_once) or (number == signal.SIGINT and not first):
            raise KeyboardInterrupt

    def at_once(self) -> None:
        """From now on the first signal is a KeyboardInterrupt; so is one that came before."""
        self._at_once = True
        if self.status is not None:
            raise KeyboardInterrupt

    def later(self) -> None:
        """From now on the first signal is remembered alone: what is found is being saved."""
        self._at_once = False


def _detect(
    predictor: Predictor | OnnxPredictor, files: list[Path]
) -> Iterator[tuple[np.ndarray, ArrayDetections] | DatasetError]:
    """For each file its pixels and detections, or why it could not be read; batch by batch."""
    size = predictor.batch_size
    parts = [files[start : start + size] for start in range(0, len(files), size)]
    # The next batch is read while this one is detected on, drawn and written.
    batches = read_ahead(lambda part: [_read(file) for file in part], parts)
    for part, batch in zip(parts, batches, strict=True):
        read = [i for i, image in enumerate(batch) if not isinstance(image, DatasetError)]
        detections = iter(predictor([batch[i] for i in read], names=[str(part[i]) for i in read]))
        for image in batch:
            yield image if isinstance(image, DatasetError) else (image, _arrays(next(detections)))


def _arrays(detections: object) -> ArrayDetections:
    return ArrayDetections(*(np.asarray(column) for column in vars(detections).values()))


def _read(file: Path) -> np.ndarray | DatasetError:
    try:
        return read_image(str(file), "BGR")
    except DatasetError as error:
        return error


def _tell(failures: list[str], count: int) -> None:
    if count:
        print(f"{count} files could not be read, or their pictures written:", file=sys.stderr)
    for failure in failures:
        print(f"  - {printable(failure)}", file=sys.stderr)
    if count > len(failures):
        print("  - ... the others are in predictions.json, failed", file=sys.stderr)


def _images_at(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    return [path] if path.is_file() else []


if __name__ == "__main__":
    sys.exit(main())
