"""Recognises the format of annotations, and reads them as the content of a COCO json."""

from __future__ import annotations

from pathlib import Path

from cascade_det.data.annotation_file import read_annotation_file
from cascade_det.data.catalog import LIST, DatasetSource, is_label_files, is_list_of_names
from cascade_det.data.image_names import LinkRule
from cascade_det.data.issues import Issues
from cascade_det.data.label_files import Labels, find_files
from cascade_det.data.labelme import read_labelme
from cascade_det.data.via import repair_via
from cascade_det.data.voc import annotations_folder, read_voc
from cascade_det.data.yolo import read_yolo
from cascade_det.errors import DatasetError


def read_annotations(source: DatasetSource, links: LinkRule, *, masks: bool) -> Labels:
    """Read annotations of any format.

    A folder is Pascal VOC if it has an xml file, or else LabelMe; a ``.yaml``, ``.names`` or
    ``classes.txt`` is YOLO's; another ``.txt`` is a list of Pascal VOC; any other file is a COCO
    json.

    Args:
        source: the annotations, and the folder of the images.
        links: which links out of the folders of images and labels are followed.
        masks: whether to read masks, with polygons as arrays.

    Raises:
        DatasetError: the file or folder cannot be read, or has none of these formats.
    """
    path = source.json_file
    if not is_label_files(path):
        content = read_annotation_file(path, masks=masks)
        repair_via(content)
        return Labels(content)
    if path.is_dir():
        if _holds(annotations_folder(path), ".xml"):
            return read_voc(source, links)
        if _holds(path, ".json"):
            return read_labelme(source, links, masks=masks)
    elif path.suffix.lower() == LIST and not is_list_of_names(path):
        return read_voc(source, links)
    else:
        return read_yolo(source, links, masks=masks)
    raise DatasetError(
        f"{path}: is a folder without xml files (Pascal VOC) and json files (LabelMe)"
    )


def _holds(folder: Path, suffix: str) -> bool:
    # The same files as the readers see: not those of hidden folders, such as an editor's.
    return bool(find_files(folder, (suffix,), lambda name: None, Issues()))
