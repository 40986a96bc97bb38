"""Draw training images as the loader gives them: after augmentation, with their annotations.

Those are boxes, classes and masks; for a segmenter, the class of each pixel in colour.

cascade-det show-data --config-file ... --output pictures --num 16 [--grid] [KEY VALUE ...]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cascade_det.commands.arguments import config_parser, file_identity, whole
from cascade_det.commands.errors import without_traceback
from cascade_det.errors import CascadeDetError

if TYPE_CHECKING:
    from cascade_det.data.coco import CocoDataset
    from cascade_det.data.semantic import SemanticDataset


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
    from cascade_det.config import check_config, is_segmenter, load_config
    from cascade_det.engine.datasets import load_datasets
    from cascade_det.engine.log import setup_logging
    from cascade_det.engine.semantic_datasets import load_semantic_datasets
    from cascade_det.files import atomic_path
    from cascade_det.report.drawing import encode

    setup_logging()
    cfg = load_config(args.config_file, args.opts)
    check_config(cfg)
    datasets: Sequence[CocoDataset] | Sequence[SemanticDataset] = (
        load_semantic_datasets(cfg, train=True)
        if is_segmenter(cfg)
        else load_datasets(cfg, train=True)
    )
    pictures = list(itertools.islice(draw_training_samples(cfg, datasets), args.num))
    if args.grid:
        pictures = [("grid", tile([picture for _, picture in pictures]))]
    paths = [Path(args.output) / f"{name}.png" for name, _ in pictures]
    _check_replaced(paths, _files(datasets))
    for path, (_, picture) in zip(paths, pictures, strict=True):
        with atomic_path(path) as temporary:
            temporary.write_bytes(encode(picture, ".png"))
    print(f"{args.num} training images drawn: {args.output}")
    return 0


def _files(datasets: Sequence[CocoDataset] | Sequence[SemanticDataset]) -> Iterator[str]:
    """Images and label images."""
    from cascade_det.data.semantic import SemanticRecord

    for dataset in datasets:
        for record in dataset.records:
            yield record.file_name
            if isinstance(record, SemanticRecord) and record.label_file:
                yield record.label_file


def _check_replaced(paths: Sequence[Path], files: Iterable[str]) -> None:
    """Raise CascadeDetError if a picture would replace a file of the data."""
    existing = {file_identity(path): path for path in paths if path.exists()}
    for file in files if existing else ():
        if path := existing.get(file_identity(file)):
            raise CascadeDetError(
                f"--output: {path} would replace the image {file}. Give another folder."
            )
