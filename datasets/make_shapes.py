#!/usr/bin/env python3
"""Make a data set of drawn shapes, in COCO format and as label images; the demo is trained on it.

Each image depends only on (seed, split, index, size, share of hard scenes): image 7 is the same in
a set of 10 and in a set of 10,000. ``shape_scenes.py`` draws them.

    python datasets/make_shapes.py --output datasets/shapes --train 500 --val 100 --seed 0
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cascade_det.commands.errors import without_traceback

JPEG_QUALITY = 92
MARKER = "parameters.json"
SPLITS = ("train", "val")
LABELS = "labels"
_MADE = (MARKER, LABELS, *SPLITS, *(f"{split}.json" for split in SPLITS))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Draw a data set in COCO format, with label images."
    )
    parser.add_argument("--output", type=Path, default=Path("datasets/shapes"))
    parser.add_argument("--train", type=int, default=500, help="training images (500)")
    parser.add_argument("--val", type=int, default=100, help="validation images (100)")
    parser.add_argument("--width", type=int, default=320, help="of the images, pixels (320)")
    parser.add_argument("--height", type=int, default=256, help="of the images, pixels (256)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hard", type=float, default=0.2, help="share of hard scenes, 0..1 (0.2)")
    return parser


@without_traceback
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = _parser()
    values = vars(parser.parse_args(arguments))
    output = values.pop("output")
    try:
        made = make_dataset(output, **values)
    except ValueError as error:
        parser.error(str(error))
    print(f"{output}: {'made' if made else 'already there'}")
    return 0


def make_dataset(
    output: str | Path,
    *,
    train: int = 500,
    val: int = 100,
    width: int = 320,
    height: int = 256,
    seed: int = 0,
    hard: float = 0.2,
) -> bool:
    """Write ``train.json``, ``val.json``, their images and label images into a folder.

    Label images have the class of each pixel: see :class:`shape_scenes.Scene`.

    The folder appears whole or not at all: it is made beside its place and then renamed. A folder
    that was made here with other parameters is replaced. Leftovers of killed runs are removed.

    Args:
        output: the folder to make.
        train: number of training images, >= 0.
        val: number of validation images, >= 0.
        width: of every image, >= 32 pixels.
        height: of every image, >= 32 pixels.
        seed: >= 0.
        hard: share of hard scenes, 0..1.

    Returns:
        False if the folder was there already with the same parameters.

    Raises:
        ValueError: a parameter is out of range, or ``output`` or an image in it exists and was not
            made here.
        CascadeDetError: ``output`` has other parameters, and holds files not made here.
    """
    from tqdm import tqdm

    from cascade_det.files import atomic_folder, remove_leftovers
    from shape_scenes import DRAWING_VERSION

    parameters: dict[str, Any] = {"generator": "make_shapes", "version": DRAWING_VERSION}
    parameters |= {"train": train, "val": val, "width": width, "height": height}
    parameters |= {"seed": seed, "hard": hard}
    _check_parameters(parameters)
    output = Path(output)
    marker = _read_marker(output)
    if marker == parameters and (output / LABELS).is_dir():  # older versions made none
        return False
    _check_images(output, marker or {})
    remove_leftovers(output.parent)
    with atomic_folder(output, made=_MADE) as fresh:
        for split, count in zip(SPLITS, (train, val), strict=True):
            indices = tqdm(range(count), desc=f"drawing {split}", disable=None, leave=False)
            _write_split(fresh, split, indices, seed=seed, width=width, height=height, hard=hard)
        (fresh / MARKER).write_text(json.dumps(parameters, indent=2) + "\n")
    return True


def _check_parameters(parameters: dict[str, Any]) -> None:
    for key, least in (("train", 0), ("val", 0), ("seed", 0), ("width", 32), ("height", 32)):
        if parameters[key] < least:
            raise ValueError(f"{key} is {parameters[key]}: give {least} or more")
    if not 0 <= parameters["hard"] <= 1:
        raise ValueError(f"hard is {parameters['hard']}: give a share between 0 and 1")


def _read_marker(folder: Path) -> dict[str, Any] | None:
    """The parameters that ``folder`` was made with; None if it does not exist."""
    if not folder.exists():
        return None
    try:
        marker = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        marker = None
    if not isinstance(marker, dict) or marker.get("generator") != "make_shapes":
        raise ValueError(
            f"{folder} exists and was not made by this generator (it has no {MARKER} of ours): "
            "give another --output, or move it away"
        )
    return marker


def _check_images(folder: Path, marker: dict[str, Any]) -> None:
    """Raise ValueError if ``folder`` has images or label images that were not made here."""
    for path in sorted((folder / LABELS).glob("*")):
        if path.name not in SPLITS:
            raise _not_ours(folder, path)
    for split, (place, suffix) in itertools.product(SPLITS, (("", "jpg"), (LABELS, "png"))):
        for path in sorted((folder / place / split).glob("*")):
            number, count = re.fullmatch(rf"(\d{{6,}})\.{suffix}", path.name), marker.get(split)
            if not number or not isinstance(count, int) or not 1 <= int(number[1]) <= count:
                raise _not_ours(folder, path)


def _not_ours(folder: Path, path: Path) -> ValueError:
    return ValueError(
        f"{folder} has other parameters, and {path.relative_to(folder)} in it was not made by this "
        "generator and would be lost: give another --output, or move it away"
    )


def _write_split(
    folder: Path, split: str, indices: Iterable[int], *, seed: int, **scene: Any
) -> None:
    import cv2

    from shape_scenes import CLASSES, make_scene

    quality = {".jpg": [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY], ".png": []}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    places = {".jpg": folder / split, ".png": folder / LABELS / split}
    for place in places.values():
        place.mkdir(parents=True)
    for index in indices:
        pixels, objects, difficulty, labels = make_scene(seed, split, index, **scene)
        stem = f"{index + 1:06d}"
        for suffix, array in ((".jpg", pixels), (".png", labels)):
            # Not cv2.imwrite(), which does not tell why it fails.
            _, encoded = cv2.imencode(suffix, array, quality[suffix])
            (places[suffix] / f"{stem}{suffix}").write_bytes(encoded.tobytes())
        height, width = labels.shape
        image = {"id": index + 1, "file_name": f"{stem}.jpg", "height": height, "width": width}
        images.append({**image, "difficulty": difficulty})
        for annotation in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **annotation})
    content = {
        "info": {"description": f"Drawn shapes, {split}, seed {seed}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
    }
    (folder / f"{split}.json").write_text(json.dumps(content))


if __name__ == "__main__":
    sys.exit(main())
