"""Data sets that callers name by their files, as keys of a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath

from fvcore.common.config import CfgNode

from cascade_det.config import changed
from cascade_det.data.catalog import DatasetSource, dataset_of_files
from cascade_det.data.coco_json import check_coco_json
from cascade_det.data.image_names import LinkRule
from cascade_det.errors import DatasetError

Path = str | PathLike[str]
# Annotations, alone or with the folder of their images.
Data = Path | tuple[Path, Path]


def source_of(data: Data) -> DatasetSource:
    """The files of a data set.

    Args:
        data: a COCO json, YOLO's ``data.yaml``, or a folder of Pascal VOC or LabelMe; or that and
            the folder of the images. Without it, the folder is looked for near the annotations.

    Raises:
        DatasetError: a file or folder does not exist.
        ValueError: it is something else.
    """
    if isinstance(data, (str, PathLike)):
        source = dataset_of_files(fspath(data))
    elif isinstance(data, (tuple, list)) and len(data) == 2:
        source = dataset_of_files(fspath(data[0]), fspath(data[1]))
    else:
        raise ValueError(
            "data is the path of annotations, or a pair of annotations and their image folder, "
            f"not {type(data).__name__}"
        )
    if not source.json_file.exists():
        raise DatasetError(f"{source.json_file}: there are no such annotations")
    return source


def class_names_of(cfg: CfgNode, source: DatasetSource) -> list[str]:
    """The names of the classes, by category id.

    Raises:
        DatasetError: the annotations cannot be read.
    """
    links = LinkRule(cfg.CASCADE.FOLLOW_LINKS)
    return list(check_coco_json(source, links).categories.values())


def with_data(
    cfg: CfgNode, *, train: Sequence[DatasetSource] = (), test: Sequence[DatasetSource] = ()
) -> CfgNode:
    """A copy of a configuration with ``DATASETS`` of these files, named train0, ..., test0, ..."""
    named = {
        split: {f"{split}{i}": (str(s.json_file), str(s.image_root)) for i, s in enumerate(sources)}
        for split, sources in (("train", train), ("test", test))
    }
    own = [(name, *files) for split in named.values() for name, files in split.items()]
    return changed(
        cfg,
        *("CASCADE.DATASETS", tuple(own)),
        *("DATASETS.TRAIN", tuple(named["train"])),
        *("DATASETS.TEST", tuple(named["test"])),
    )
