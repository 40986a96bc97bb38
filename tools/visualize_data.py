#!/usr/bin/env python3
"""Draw what the training loader gives: images after augmentation, with their boxes and classes.

python tools/visualize_data.py --config-file ... --output pictures --num 16 [--grid] [KEY VALUE ...]
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from cascade_det.commands.arguments import add_config_options, whole


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw what the training loader gives.")
    parser.add_argument(
        "--config-file", required=True, action="append", metavar="YAML", help="later ones on top"
    )
    parser.add_argument("--output", required=True, help="folder for the pictures")
    parser.add_argument("--num", type=whole(1), default=16, help="images to draw")
    parser.add_argument("--grid", action="store_true", help="all in one picture, grid.png")
    add_config_options(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    _parse(None)  # Help and errors do not wait for the imports below.


import numpy as np
from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.commands.errors import without_traceback
from cascade_det.config import check_config, load_config
from cascade_det.data.coco import CocoDataset
from cascade_det.data.loader import build_train_loader
from cascade_det.data.samples import Sample
from cascade_det.engine.datasets import load_datasets
from cascade_det.engine.log import setup_logging
from cascade_det.errors import CascadeDetError
from cascade_det.files import atomic_path
from cascade_det.report.colors import class_color
from cascade_det.report.drawing import draw_boxes, encode


@without_traceback
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parse(argv)
    setup_logging()
    cfg = load_config(args.config_file, args.opts)
    check_config(cfg)
    datasets = load_datasets(cfg, train=True)
    pictures = list(itertools.islice(draw_training_samples(cfg, datasets), args.num))
    if args.grid:
        pictures = [("grid", tile([picture for _, picture in pictures]))]
    paths = [Path(args.output) / f"{name}.png" for name, _ in pictures]
    _check_replaced(paths, datasets)
    for path, (_, picture) in zip(paths, pictures, strict=True):
        with atomic_path(path) as temporary:
            temporary.write_bytes(encode(picture, ".png"))
    print(f"{args.num} training images drawn: {args.output}")
    return 0


def _check_replaced(paths: Sequence[Path], datasets: Sequence[CocoDataset]) -> None:
    """Make sure that no picture takes the place of an image of the data."""
    places = {_place(path): path for path in paths if path.exists()}
    for record in itertools.chain.from_iterable(d.records for d in datasets if places):
        if path := places.get(_place(record.file_name)):
            raise CascadeDetError(
                f"--output: {path} would replace the image {record.file_name}. Give another folder."
            )


def _place(path: str | Path) -> tuple[int, int]:
    """What is the same for all names of a file."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def draw_training_samples(
    cfg: CfgNode, datasets: Sequence[CocoDataset]
) -> Iterator[tuple[str, np.ndarray]]:
    """Pictures of the first samples of a training run, without end.

    Args:
        cfg: a checked configuration. A ``SEED`` below 0, which a run would draw, is 0 here.
        datasets: those of ``DATASETS.TRAIN``.

    Yields:
        A name from the place in the run and the image id, and the picture, uint8 ``[H, W, 3]`` BGR.
    """
    arguments = config.train_loader_arguments(cfg)
    arguments.update(seed=max(arguments["seed"], 0), num_workers=0)
    loader = build_train_loader(
        datasets,
        **config.input_arguments(cfg, train=True),
        **arguments,
        on_bad_data=cfg.CASCADE.ON_BAD_DATA,
    )
    for number, sample in enumerate(itertools.chain.from_iterable(loader)):
        name = f"{number:04d}_image{sample['image_id']}"
        yield name, _draw(sample, cfg.INPUT.FORMAT, datasets[0].class_names)


def tile(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """One picture of all, row by row in a grid that is about square, on grey ground."""
    columns = math.ceil(math.sqrt(len(pictures)))
    height = max(picture.shape[0] for picture in pictures)
    width = max(picture.shape[1] for picture in pictures)
    rows = math.ceil(len(pictures) / columns)
    canvas = np.full((rows * height, columns * width, 3), 128, np.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // columns * height, index % columns * width
        canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return canvas


def _draw(sample: Sample, image_format: str, class_names: Sequence[str]) -> np.ndarray:
    pixels = sample["image"].permute(1, 2, 0).numpy()
    classes = sample["gt_classes"].tolist()
    return draw_boxes(
        pixels if image_format == "BGR" else pixels[..., ::-1],
        sample["gt_boxes"],
        [class_names[index] for index in classes],
        [class_color(index) for index in classes],
    )


if __name__ == "__main__":
    sys.exit(main())
