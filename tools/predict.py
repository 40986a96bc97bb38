#!/usr/bin/env python3
"""Detect objects in images: annotated pictures and a COCO-format json with exit stages.

python tools/predict.py --config-file ... --input photo.jpg 'folder/*.png' folder --output out \
    --opts MODEL.WEIGHTS output/model_final.pth
python tools/predict.py --onnx model.onnx --input folder --output out   # a file of tools/export.py
"""

from __future__ import annotations

import argparse
import glob
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Detect objects in images.")
    detector = parser.add_mutually_exclusive_group(required=True)
    detector.add_argument(
        "--config-file", action="append", metavar="YAML", help="of weights; later ones on top"
    )
    detector.add_argument("--onnx", metavar="FILE", help="of tools/export.py; needs nothing else")
    parser.add_argument(
        "--input", required=True, nargs="+", help="image files, folders or quoted globs"
    )
    parser.add_argument("--output", required=True, help="folder for pictures and predictions.json")
    parser.add_argument("--score-threshold", type=float, default=0.5, help="of what is drawn")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="as train_net.py"
    )
    args = parser.parse_args(argv)
    if args.onnx and args.opts:
        parser.error("--opts change a configuration, which an ONNX file (--onnx) has no need of")
    return args


if __name__ == "__main__":
    _parse(None)  # Help and errors do not wait for the imports below.


import cv2
import numpy as np
import torch
from tqdm import tqdm

from cascade_det.config import check_config, exit_arguments, load_config
from cascade_det.core import Detections
from cascade_det.data.read_ahead import read_ahead
from cascade_det.data.transforms import read_image
from cascade_det.drawing import draw_detections
from cascade_det.engine.commands import without_traceback
from cascade_det.engine.log import setup_logging
from cascade_det.engine.processes import INTERRUPTED
from cascade_det.errors import DatasetError
from cascade_det.evaluation import format_report
from cascade_det.evaluation.coco import coco_results
from cascade_det.files import atomic_path, write_json
from cascade_det.onnx_predictor import ArrayDetections, OnnxPredictor
from cascade_det.standalone import Predictor

MOST_TOLD = 20  # failed files on the terminal
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


@without_traceback
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 1 if a file failed, 130 after Ctrl-C."""
    args = _parse(argv)
    setup_logging()
    files = find_images(args.input)
    output = Path(args.output)
    if args.onnx:
        return predict(OnnxPredictor(args.onnx), files, output, args.score_threshold)
    cfg = load_config(args.config_file, args.opts)
    check_config(cfg)
    watched = cfg.CASCADE.SHADOW_SHARE > 0
    predictor = Predictor(cfg, metrics_dir=output if watched else None)
    with predictor.monitor as monitor:
        exits = exit_arguments(cfg) is not None
        status = predict(predictor, files, output, args.score_threshold, with_stages=exits)
        if watched:
            print(format_report(monitor.report()))
    return status


def find_images(patterns: list[str]) -> list[Path]:
    """Files, the images of folders, and what globs match; in order, each once.

    Raises:
        DatasetError: if a pattern gives no image.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        paths = [Path(p) for p in sorted(glob.glob(pattern))] or [Path(pattern)]
        images = [image for path in paths for image in _images_at(path)]
        if not images:
            raise DatasetError(f"--input {pattern}: no such file, or a folder without images")
        found.update(dict.fromkeys(images))
    return list(found)


def predict(
    predictor: Predictor | OnnxPredictor,
    files: list[Path],
    output: Path,
    score_threshold: float,
    *,
    with_stages: bool = False,
) -> int:
    """Write a picture for every image, and ``predictions.json`` for all of them.

    A file that cannot be read is left out and told at the end, in the json as well: ``failed`` is
    a list of ``{"file_name", "reason"}``. After Ctrl-C the json has the images that were done.

    Args:
        predictor: the detector.
        files: image files; an image's id is its place among them, from 1 on.
        output: folder, made if missing.
        score_threshold: detections below it are in the json, but not drawn.
        with_stages: draw the exit stages too.

    Returns:
        The exit status: 0, 1 if a file failed, or 130 after Ctrl-C.
    """
    names = _picture_names(files)
    for file, name in zip(files, names, strict=True):
        if (output / name).resolve() == file.resolve():
            raise DatasetError(f"--output {output}: its pictures would replace the input {file}")
    done: list[tuple[dict, list[dict]]] = []
    failed: list[dict[str, str]] = []
    interrupted = False
    results = tqdm(_detect(predictor, files), total=len(files), disable=None, unit="img")
    try:
        for number, found in enumerate(results):
            file = files[number]
            if isinstance(found, DatasetError):
                reason = str(found).removeprefix(f"{file}: ")
                failed.append({"file_name": str(file), "reason": reason})
                continue
            image, detections = found
            picture = draw_detections(
                *(image, detections, predictor.class_names),
                score_threshold=score_threshold,
                with_stages=with_stages,
            )
            with atomic_path(output / names[number]) as temporary:
                temporary.write_bytes(cv2.imencode(".jpg", picture)[1].tobytes())
            height, width = image.shape[:2]
            record = {"id": number + 1, "file_name": str(file), "height": height, "width": width}
            done.append((record, coco_results(detections, number + 1, predictor.category_ids)))
    except KeyboardInterrupt:
        interrupted = True
    write_json(_coco_json(predictor, done, failed), output / "predictions.json")
    count = sum(len(annotations) for _, annotations in done)
    print(f"{len(done)} images, {count} detections: {output}")
    _tell(failed, unfinished=len(files) - len(done) - len(failed))
    return INTERRUPTED if interrupted else int(bool(failed))


def _detect(
    predictor: Predictor | OnnxPredictor, files: list[Path]
) -> Iterator[tuple[np.ndarray, Detections] | DatasetError]:
    """For each file its pixels and detections, or why it could not be read; batch by batch."""
    size = predictor.batch_size
    parts = [files[start : start + size] for start in range(0, len(files), size)]
    # The next batch is read while this one is detected on, drawn and written.
    batches = read_ahead(lambda part: [_read(file) for file in part], parts)
    for part, batch in zip(parts, batches, strict=True):
        read = [i for i, image in enumerate(batch) if not isinstance(image, DatasetError)]
        detections = iter(predictor([batch[i] for i in read], names=[str(part[i]) for i in read]))
        for image in batch:
            yield image if isinstance(image, DatasetError) else (image, _tensors(next(detections)))


def _tensors(detections: Detections | ArrayDetections) -> Detections:
    return Detections(*(torch.as_tensor(column) for column in vars(detections).values()))


def _read(file: Path) -> np.ndarray | DatasetError:
    try:
        return read_image(str(file), "BGR")
    except DatasetError as error:
        return error


def _coco_json(
    predictor: Predictor | OnnxPredictor,
    done: list[tuple[dict, list[dict]]],
    failed: list[dict[str, str]],
) -> dict:
    annotations: list[dict] = []
    for result in itertools.chain.from_iterable(results for _, results in done):
        _, _, width, height = result["bbox"]
        rest = {"id": len(annotations) + 1, "area": width * height, "iscrowd": 0}
        annotations.append({**result, **rest})
    categories = [
        {"id": category_id, "name": name}
        for category_id, name in zip(predictor.category_ids, predictor.class_names, strict=True)
    ]
    images = [record for record, _ in done]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return {**content, "failed": failed}


def _tell(failed: list[dict[str, str]], unfinished: int) -> None:
    if unfinished:
        print(f"Interrupted: {unfinished} images are not done.", file=sys.stderr)
    if failed:
        print(f"{len(failed)} files could not be read:", file=sys.stderr)
    for failure in failed[:MOST_TOLD]:
        print(f"  - {failure['file_name']}: {failure['reason']}", file=sys.stderr)
    if len(failed) > MOST_TOLD:
        print("  - ... the others are in predictions.json, failed", file=sys.stderr)


def _images_at(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    return [path] if path.is_file() else []


def _picture_names(files: list[Path]) -> list[str]:
    """``name.jpg``; files of one name in several folders are numbered."""
    names: dict[str, None] = {}
    for file in files:
        name, number = f"{file.stem}.jpg", 2
        while name in names:
            name, number = f"{file.stem}_{number}.jpg", number + 1
        names[name] = None
    return list(names)


if __name__ == "__main__":
    sys.exit(main())
