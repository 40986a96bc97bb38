"""Finds data sets for semantic segmentation by the names that the user declares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from cascade_det.data.semantic.formats import FORMATS, SemanticSource
from cascade_det.errors import DatasetError

OWN_KEY = "CASCADE.SEMANTIC_DATASETS"
CLASSES_KEY = "CASCADE.SEMANTIC_CLASSES"
IGNORE_KEY = "MODEL.SEM_SEG_HEAD.IGNORE_VALUE"


def find_semantic_dataset(
    name: str,
    own_datasets: Iterable[Sequence[str]],
    *,
    class_names: Sequence[str] = (),
    ignore_value: int = 255,
) -> SemanticSource:
    """Find a data set by name and check that its folders exist.

    Args:
        name: of a declared data set.
        own_datasets: (name, format, folder) each, or (name, "folders", images, labels); relative
            paths start from the working directory, ``~`` is the home folder.
        class_names: of the format "folders", in the order of the labels from 0; others have their
            own.
        ignore_value: the label of pixels that do not count.

    Raises:
        DatasetError: an unknown name, a missing folder, no class names, or an ignored value that
            no label of 8 bits has.
    """
    own = {entry[0]: entry for entry in own_datasets}
    if name not in own:
        raise DatasetError(
            f"there is no data set {name!r} for semantic segmentation. Declare it in {OWN_KEY} as "
            f"(name, format, folder); known names: {', '.join(own) or 'none'}."
        )
    _, kind, *folders = own[name]
    how = FORMATS[kind]
    names = how.class_names or tuple(class_names)
    if not 0 <= ignore_value <= 255:
        raise DatasetError(f"{IGNORE_KEY} is {ignore_value}; label images hold 0 to 255")
    if not 1 <= len(names) <= 256:
        raise DatasetError(
            f"data set {name!r}: {CLASSES_KEY} has {len(names)} names; list the name of each "
            "class, 1 to 256, in the order of their labels from 0"
        )
    places = [Path(folder).expanduser() for folder in folders]
    places += [places[0] / below for below in how.folders]
    for place in places:
        if not place.is_dir():
            raise DatasetError(
                f"data set {name!r}: there is no folder {place}. Correct the entry {name!r} of "
                f"{OWN_KEY}."
            )
    images, labels = places[-2:] if len(places) > 1 else (places[0], None)
    return SemanticSource(name, kind, images, labels, names, ignore_value)
