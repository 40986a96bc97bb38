"""Finds data sets by name: Detectron2's built-in COCO names, and names that the user declares."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cascade_det.errors import DatasetError

ROOT_VARIABLE = "DETECTRON2_DATASETS"
OWN_DATASETS_KEY = "CASCADE.DATASETS"
LIST = ".txt"  # of Pascal VOC
_YAML = (".yaml", ".yml")  # YOLO
# Names of YOLO's classes, one a line: darknet and CVAT write obj.names, Label Studio classes.txt.
_NAMES, _CLASSES = ".names", "classes.txt"

# name: (annotation file, image folder), below "coco/" in the folder of all data sets.
_BUILTIN_COCO = {
    "coco_2014_train": ("instances_train2014.json", "train2014"),
    "coco_2014_val": ("instances_val2014.json", "val2014"),
    "coco_2014_minival": ("instances_minival2014.json", "val2014"),
    "coco_2014_valminusminival": ("instances_valminusminival2014.json", "val2014"),
    "coco_2017_train": ("instances_train2017.json", "train2017"),
    "coco_2017_val": ("instances_val2017.json", "val2017"),
    "coco_2017_test": ("image_info_test2017.json", "test2017"),
    "coco_2017_test-dev": ("image_info_test-dev2017.json", "test2017"),
    "coco_2017_val_100": ("instances_val2017_100.json", "val2017"),
}


@dataclass(frozen=True)
class DatasetSource:
    """A named data set: its annotations and the folder that its file names are relative to.

    Attributes:
        name: any text.
        json_file: a COCO-format json, YOLO's ``data.yaml`` or names of classes, a folder of label
            files or a list of Pascal VOC.
        image_root: the folder of the images.
    """

    name: str
    json_file: Path
    image_root: Path


def find_dataset(name: str, own_datasets: Iterable[tuple[str, str, str]] = ()) -> DatasetSource:
    """Find a data set by name and check that it exists.

    Args:
        name: a declared data set, or one of Detectron2's COCO names, which are below the folder
            ``$DETECTRON2_DATASETS`` (default: ``datasets``).
        own_datasets: triples of name, annotations and image folder; relative paths start from the
            working directory, ``~`` is the home folder.

    Raises:
        DatasetError: an unknown or ambiguous name, or a missing file or folder.
    """
    own = _own_sources(own_datasets)
    source = own.get(name) or _builtin_source(name)
    if source is None:
        raise DatasetError(_unknown_name(name, [*own, *_BUILTIN_COCO]))
    if not source.json_file.exists():
        missing = f"annotation file {source.json_file}"
    elif not source.image_root.is_dir():
        missing = f"image folder {source.image_root}"
    else:
        return source
    if name in own:
        remedy = f"Correct the entry {name!r} of {OWN_DATASETS_KEY}."
    else:
        remedy = (
            f"Set the environment variable {ROOT_VARIABLE} to the folder that holds 'coco/' "
            f"(it is {str(_builtin_root())!r} now)."
        )
    raise DatasetError(f"data set {name!r}: there is no {missing}. {remedy}")


def dataset_of_files(json_file: str, image_folder: str | None = None) -> DatasetSource:
    """A data set that is not declared anywhere, named after its annotations.

    Args:
        json_file: of any format, see ``DatasetSource``.
        image_folder: of its images; by default ``images`` or ``JPEGImages`` beside YOLO's or Pascal
            VOC's annotations, or else the folder of the annotations.

    Raises:
        DatasetError: the folder does not exist.
    """
    path = Path(json_file)
    if image_folder is not None and not Path(image_folder).is_dir():
        raise DatasetError(f"{image_folder}: there is no such folder of images")
    return DatasetSource(path.stem, path, Path(image_folder or _usual_image_folder(path)))


def _usual_image_folder(path: Path) -> Path:
    if not is_label_files(path):
        return path.parent
    parents = Path(os.path.abspath(path)).parents
    # A list of Pascal VOC is ImageSets/Main/train.txt.
    beside = parents[:3] if path.suffix.lower() == LIST else [path, parents[0]]
    found = [folder / name for folder in beside for name in ("JPEGImages", "images")]
    fallback = path if path.is_dir() else path.parent
    return next((folder for folder in found if folder.is_dir()), fallback)


def is_label_files(path: Path) -> bool:
    """Whether annotations have another format than COCO's."""
    return path.is_dir() or path.suffix.lower() in (LIST, _NAMES, *_YAML)


def is_list_of_names(path: Path) -> bool:
    """Whether a file has nothing but the names of YOLO's classes."""
    return path.suffix.lower() == _NAMES or path.name == _CLASSES


def _own_sources(own_datasets: Iterable[tuple[str, str, str]]) -> dict[str, DatasetSource]:
    """The declared data sets by name; each name must be unique."""
    sources: dict[str, DatasetSource] = {}
    for name, json_file, image_root in own_datasets:
        source = DatasetSource(name, Path(json_file).expanduser(), Path(image_root).expanduser())
        other = sources.get(name) or _builtin_source(name)
        if other is not None and _resolved(source) != _resolved(other):
            raise DatasetError(
                f"{OWN_DATASETS_KEY}: the name {name!r} means {source.json_file} with images in "
                f"{source.image_root}, and also {other.json_file} with images in "
                f"{other.image_root}. Give one of them another name."
            )
        sources[name] = source
    return sources


def _resolved(source: DatasetSource) -> tuple[Path, Path]:
    return source.json_file.resolve(), source.image_root.resolve()


def _builtin_source(name: str) -> DatasetSource | None:
    if name not in _BUILTIN_COCO:
        return None
    json_name, folder = _BUILTIN_COCO[name]
    coco = _builtin_root() / "coco"
    return DatasetSource(name, coco / "annotations" / json_name, coco / folder)


def _builtin_root() -> Path:
    return Path(os.environ.get(ROOT_VARIABLE, "datasets")).expanduser()


def _unknown_name(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    return (
        f"there is no data set {name!r}. {hint}A data set of your own is declared in "
        f"{OWN_DATASETS_KEY} as (name, annotations, image folder); known names: {', '.join(known)}."
    )
