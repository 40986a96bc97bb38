#!/usr/bin/env python3
"""Detect objects in images: annotated pictures and a COCO-format json with exit stages.

python tools/predict.py --config-file ... --input photo.jpg 'folder/*.png' folder --output out \
    --opts MODEL.WEIGHTS output/model_final.pth
"""

from __future__ import annotations

import argparse
import glob
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
from tqdm import tqdm

from cascade_det.config import check_config, load_config
from cascade_det.data.transforms import read_image
from cascade_det.engine.log import setup_logging
from cascade_det.errors import CascadeDetError, DatasetError
from cascade_det.evaluation.coco import coco_results
from cascade_det.evaluation.drawing import draw_detections
from cascade_det.files import write_json
from cascade_det.standalone import Predictor

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parse(argv)
    setup_logging()
    try:
        files = find_images(args.input)
        cfg = load_config(args.config_file, args.opts)
        check_config(cfg)
        predictor = Predictor(cfg)
        predict(predictor, files, Path(args.output), args.score_threshold)
    except CascadeDetError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


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


def predict(predictor: Predictor, files: list[Path], output: Path, score_threshold: float) -> None:
    """Write a picture for every image, and ``predictions.json`` for all of them.

    Args:
        predictor: the detector.
        files: image files.
        output: folder, made if missing.
        score_threshold: detections below it are in the json, but not drawn.
    """
    output.mkdir(parents=True, exist_ok=True)
    results = tqdm(_detect(predictor, files), total=len(files), disable=None, unit="img")
    images: list[dict] = []
    annotations: list[dict] = []
    for image_id, (file, name, image, detections) in enumerate(results, 1):
        picture = draw_detections(
            image, detections, predictor.class_names, score_threshold=score_threshold
        )
        if (output / name).resolve() == file.resolve():
            raise DatasetError(f"--output {output}: its pictures would replace the input {file}")
        if not cv2.imwrite(str(output / name), picture):
            raise DatasetError(f"{output / name}: could not be written")
        height, width = image.shape[:2]
        images.append({"id": image_id, "file_name": str(file), "height": height, "width": width})
        for result in coco_results(detections, image_id, predictor.category_ids):
            _, _, box_width, box_height = result["bbox"]
            rest = {"id": len(annotations) + 1, "area": box_width * box_height, "iscrowd": 0}
            annotations.append({**result, **rest})
    categories = [
        {"id": category_id, "name": name}
        for category_id, name in zip(predictor.category_ids, predictor.class_names, strict=True)
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_json(content, output / "predictions.json")
    print(f"{len(files)} images, {len(annotations)} detections: {output}")


def _detect(predictor: Predictor, files: list[Path]) -> Iterator[tuple]:
    """File, name of its picture, pixels and detections, in batches of the predictor's size."""
    named = list(zip(files, _picture_names(files), strict=True))
    for start in range(0, len(named), predictor.batch_size):
        batch = named[start : start + predictor.batch_size]
        images = [read_image(str(file), "BGR") for file, _ in batch]
        for (file, name), image, detections in zip(batch, images, predictor(images), strict=True):
            yield file, name, image, detections


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


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Detect objects in images.")
    parser.add_argument("--config-file", required=True, metavar="YAML")
    parser.add_argument(
        "--input", required=True, nargs="+", help="image files, folders or quoted globs"
    )
    parser.add_argument("--output", required=True, help="folder for pictures and predictions.json")
    parser.add_argument("--score-threshold", type=float, default=0.5, help="of what is drawn")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="as train_net.py"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
