"""Draw training images as the loader gives them: after augmentation, with boxes, classes, masks.

cascade-det show-data --config-file ... --output pictures --num 16 [--grid] [KEY VALUE ...]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cascade_det.commands.arguments import config_parser, file_identity, whole
from cascade_det.commands.errors import without_traceback
from cascade_det.errors import CascadeDetError

if TYPE_CHECKING:
    from cascade_det.data.coco import CocoDataset


def _parse(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    parser = config_parser(prog, __doc__)
    parser.add_argument("--output", required=True, help="folder for the pictures")
    parser.add_argument("--num", type=whole(1), default=16, help="images to draw (16)")
    parser.add_argument("--grid", action="store_true", help="all in one picture, grid.png")
    return parser.parse_args(argv)


@without_traceback
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parse(argv, prog)
    from cascade_det.commands.training_pictures import draw_training_samples, tile
    from cascade_det.config import check_config, load_config
    from cascade_det.engine.datasets import load_datasets
    from cascade_det.engine.log import setup_logging
    from cascade_det.files import atomic_path
    from cascade_det.report.drawing import encode

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
    """Raise CascadeDetError if a picture would replace an image of the data."""
    existing = {file_identity(path): path for path in paths if path.exists()}
    for record in itertools.chain.from_iterable(d.records for d in datasets if existing):
        if path := existing.get(file_identity(record.file_name)):
            raise CascadeDetError(
                f"--output: {path} would replace the image {record.file_name}. Give another folder."
            )
