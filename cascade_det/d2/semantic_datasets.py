"""Data sets for semantic segmentation that are registered in Detectron2's catalogs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from cascade_det.data.semantic import SemanticSource, find_semantic_dataset
from cascade_det.errors import DatasetError


def find_registered(
    name: str,
    own_datasets: Iterable[Sequence[str]],
    *,
    class_names: Sequence[str] = (),
    ignore_value: int = 255,
) -> SemanticSource:
    """Find a data set among the user's own, or else among those that Detectron2 knows.

    Ours are not registered: our loader reads both, and Detectron2 has none for volumes.

    Args:
        name: of one of ``own_datasets``, or of a data set of label images in the catalog, such as
            Detectron2's ``ade20k_sem_seg_val``.
        own_datasets: see ``find_semantic_dataset``.
        class_names: of the user's own; a registered one has its ``stuff_classes``.
        ignore_value: the label of pixels that do not count.

    Raises:
        DatasetError: as ``find_semantic_dataset``; or the registered set has no folders of images
            and label images, these are missing, or it ignores another label.
    """
    own_datasets = list(own_datasets)
    if name not in DatasetCatalog.list() or any(entry[0] == name for entry in own_datasets):
        return find_semantic_dataset(
            name, own_datasets, class_names=class_names, ignore_value=ignore_value
        )
    metadata = MetadataCatalog.get(name)
    keys = ("image_root", "sem_seg_root", "stuff_classes")
    images, labels, names = (metadata.get(key) for key in keys)
    if images is None or labels is None or names is None:
        raise DatasetError(
            f"data set {name!r} is registered in Detectron2 without folders of images and label "
            f"images: its metadata needs {', '.join(keys)}. Set them, or declare the folders in "
            "CASCADE.SEMANTIC_DATASETS under another name."
        )
    ignored = metadata.get("ignore_label", ignore_value)
    if ignored != ignore_value:
        remedy = (
            f"Set it to {ignored}."
            if ignored > 0
            else "Label 0 is a class here: register the labels with another one."
        )
        raise DatasetError(
            f"data set {name!r} is registered in Detectron2 with ignore_label {ignored}, but "
            f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {ignore_value}. {remedy}"
        )
    if not Path(images).is_dir() or not Path(labels).is_dir():
        raise DatasetError(
            f"data set {name!r} is registered in Detectron2 with images in {images} and labels in "
            f"{labels}, of which one is missing. For its own data sets, set the environment "
            "variable DETECTRON2_DATASETS to the folder that holds them."
        )
    return find_semantic_dataset(
        name,
        [(name, "folders", str(images), str(labels))],
        class_names=names,
        ignore_value=ignore_value,
    )
