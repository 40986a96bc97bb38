"""Registration of a configuration's data sets in Detectron2's catalogs."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from cascade_det import config
from cascade_det.data.catalog import DatasetSource, find_dataset, is_label_files
from cascade_det.data.coco import CocoDataset, load_dataset
from cascade_det.errors import ConfigError, DatasetError
from cascade_det.files import write_json

_ORIGIN = "annotations_of_other_format"  # key of the metadata


def register_dataset(name: str, own_datasets: Iterable[tuple[str, str, str]] = ()) -> DatasetSource:
    """Register a data set in Detectron2 unless it is registered, and return its files.

    Annotations of another format than COCO's are registered as a temporary json.

    Args:
        name: one of ``own_datasets``, one of Detectron2's COCO names, or one registered in its
            catalog with a COCO-format json.
        own_datasets: ``CASCADE.DATASETS``: name, annotations and image folder of each.

    Raises:
        DatasetError: the name is unknown or registered for other files, or a file or folder is
            missing.
    """
    own_datasets = list(own_datasets)
    registered = _registered(name)
    is_own = any(name == own for own, _, _ in own_datasets)
    if registered is not None and not is_own:
        return _existing(registered)
    source = find_dataset(name, own_datasets)
    if registered is None:
        json_file = _coco_json(source)
        # For those who ask again: which files the name means.
        metadata = {} if json_file == source.json_file else {_ORIGIN: str(source.json_file)}
        register_coco_instances(name, metadata, str(json_file), str(source.image_root))
    elif _paths(registered) != _paths(source):
        raise DatasetError(
            f"CASCADE.DATASETS: {name!r} is {source.json_file} with images in {source.image_root}, "
            f"but Detectron2 has registered it as {registered.json_file} with images in "
            f"{registered.image_root}. Give it another name."
        )
    return source


def _coco_json(source: DatasetSource) -> Path:
    """The annotations as a json, which Detectron2's reader and evaluator need.

    Bad entries are left out: the run's own loading of the same files has reported them, or will.
    """
    if not is_label_files(source.json_file):
        return source.json_file
    # Until the process ends: Detectron2 reads it when it likes.
    folder = tempfile.mkdtemp(prefix="cascade_det-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    dataset = load_dataset(source, "skip", masks="keep", keep_ground_truth=True, check_images=False)
    json_file = Path(folder, f"{source.json_file.stem}.json")
    write_json(dataset.ground_truth, json_file)
    return json_file


def refuse_left_out(datasets: Sequence[CocoDataset]) -> None:
    """Check that ``CASCADE.ON_BAD_DATA skip`` left out no entry of a json.

    Raises:
        DatasetError: it did, but Detectron2 reads the json itself, with the wrong entries.
    """
    for dataset in datasets:
        if dataset.left_out:
            kinds = ", ".join(f"{count} x {kind}" for kind, count in dataset.left_out.items())
            raise DatasetError(
                f"{dataset.source.json_file}: {kinds}. Detectron2 reads the file itself and "
                "cannot leave these out (CASCADE.ON_BAD_DATA 'skip'). Fix the file, or use "
                "--host standalone."
            )


def without_maskless(cfg: CfgNode) -> CfgNode:
    """A configuration that reads data sets as Detectron2 does: without objects without a mask."""
    return config.changed(cfg, "CASCADE.MASKLESS", "drop")


def check_mask_format(cfg: CfgNode, datasets: Sequence[CocoDataset]) -> None:
    """Check that Detectron2 can train on the masks of data sets.

    Raises:
        ConfigError: ``INPUT.MASK_FORMAT`` is ``polygon``, but masks are RLE.
    """
    if not cfg.MODEL.MASK_ON or cfg.INPUT.MASK_FORMAT != "polygon":
        return
    for dataset in datasets:
        masks = (mask for record in dataset.records for mask in record.masks or ())
        if count := sum(isinstance(mask, dict) for mask in masks):
            raise ConfigError(
                f"INPUT.MASK_FORMAT is 'polygon', but {dataset.source.json_file} has {count:,} "
                "objects whose mask is RLE, which Detectron2 cannot turn into polygons. Set it to "
                "bitmask, or use --host standalone."
            )


def _registered(name: str) -> DatasetSource | None:
    if name not in DatasetCatalog.list():
        return None
    metadata = MetadataCatalog.get(name)
    json_file = metadata.get(_ORIGIN, metadata.get("json_file"))
    image_root = metadata.get("image_root")
    if json_file is None or image_root is None:
        raise DatasetError(
            f"data set {name!r} is registered in Detectron2 without a COCO-format json: its "
            "metadata needs json_file and image_root (see register_coco_instances)"
        )
    return DatasetSource(name, Path(json_file), Path(image_root))


def _existing(source: DatasetSource) -> DatasetSource:
    if not source.json_file.exists() or not source.image_root.is_dir():
        raise DatasetError(
            f"data set {source.name!r} is registered in Detectron2 as {source.json_file} with "
            f"images in {source.image_root}, of which one is missing. For its own data sets, set "
            "the environment variable DETECTRON2_DATASETS to the folder that holds 'coco/'."
        )
    return source


def _paths(source: DatasetSource) -> tuple[Path, Path]:
    return source.json_file.resolve(), source.image_root.resolve()
