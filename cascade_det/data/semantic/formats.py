"""The formats of data sets for semantic segmentation, and how each is read from its files.

H, W = height and width of an image; K = number of classes. Labels are uint8 ``[H, W]``: the class
of each pixel, or the ignored value. Images are uint8 ``[H, W, 3]``, or grey ``[H, W]``, which is
float32 in 0..255 where the file holds numbers in [0, 1]: 8 bits would lose grey levels of a CT.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cascade_det.data.image_names import IMAGE_SUFFIXES
from cascade_det.data.issues import Issues
from cascade_det.errors import DatasetError
from cascade_det.text import printable

NPZ, H5 = ".npz", ".npy.h5"

NO_PARTNER = "file without a partner of the same name in the other folder"
SAME_STEM = "files of one folder with the same name but for the ending"


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        class_names: length K; empty where the user names them.
        folders: the folders of images and of labels below the data set's; empty where the user
            gives both, or where arrays hold image and labels together.
        keys: of the image and the labels in an array file; ``None`` for image files.
        suffixes: the endings of array files.
        new_label: the class of each label in the files; empty if they are the classes.
        is_mask: whether labels are masks of one foreground class, at grey levels from 128.
    """

    class_names: tuple[str, ...] = ()
    folders: tuple[str, str] | tuple[()] = ()
    keys: tuple[str, str] | None = None
    suffixes: tuple[str, ...] = ()
    new_label: tuple[int, ...] = ()
    is_mask: bool = False


_SYNAPSE = Format(
    class_names=(
        "background",
        "spleen",
        "right kidney",
        "left kidney",
        "gallbladder",
        "pancreas",
        "liver",
        "stomach",
        "aorta",
    ),
    keys=("image", "label"),
    suffixes=(NPZ, H5),
)
# By the name in CASCADE.SEMANTIC_DATASETS.
FORMATS = {
    "folders": Format(),
    "synapse": _SYNAPSE,
    # The 13 organs of the original labels; 5, 9, 10, 12 and 13 have no class here.
    "synapse-14": Format(
        _SYNAPSE.class_names,
        keys=_SYNAPSE.keys,
        suffixes=_SYNAPSE.suffixes,
        new_label=(0, 1, 2, 3, 4, 0, 6, 7, 8, 0, 0, 5, 0, 0),
    ),
    "acdc": Format(
        ("background", "right ventricle", "myocardium", "left ventricle"),
        keys=("img", "label"),
        suffixes=(NPZ,),
    ),
    "polyp": Format(("background", "polyp"), folders=("images", "masks"), is_mask=True),
}


@dataclass(frozen=True)
class SemanticSource:
    """A named data set.

    Attributes:
        name: in ``DATASETS.TRAIN`` and ``TEST``.
        format: one of ``FORMATS``.
        folder: of the images, or of the array files.
        label_folder: of the label images; ``None`` for array files.
        class_names: length K.
        ignore_value: the label of pixels that no loss and no metric counts, 0..255.
    """

    name: str
    format: str
    folder: Path
    label_folder: Path | None
    class_names: tuple[str, ...]
    ignore_value: int = 255


@dataclass(frozen=True)
class Entry:
    """An image with its labels, or an array file with one or several.

    Attributes:
        file_name: full path of the image or the array file.
        label_file: full path of the label image; "" for an array file.
    """

    file_name: str
    label_file: str = ""


def list_entries(source: SemanticSource, bad: Issues) -> list[Entry]:
    """The files of a data set, sorted by name; what cannot be paired is added to ``bad``.

    Hidden files, subfolders, and files with other endings are passed over.

    Raises:
        DatasetError: no file is left.
    """
    if source.label_folder is None:
        suffixes = FORMATS[source.format].suffixes
        entries = [Entry(str(path)) for path in _files(source.folder, suffixes)]
        wanted = f"no {' or '.join(suffixes)} file"
    else:
        entries = list(_pairs(source, bad))
        wanted = "no image with a label image of the same name"
    if not entries:
        raise DatasetError(
            f"data set {source.name!r}: there is {wanted} in {source.folder}"
            f"{'' if source.label_folder is None else f' and {source.label_folder}'}"
            + (f"\n{bad}" if bad else "")
        )
    return entries


def _pairs(source: SemanticSource, bad: Issues) -> Iterator[Entry]:
    """Pairs by stem. For polyps this is the published pairing by sorted name, checked."""
    assert source.label_folder is not None
    is_mask = FORMATS[source.format].is_mask
    images = _by_stem(source.folder, IMAGE_SUFFIXES, bad)
    labels = _by_stem(source.label_folder, IMAGE_SUFFIXES if is_mask else (".png",), bad)
    for stem in sorted(images.keys() ^ labels.keys()):
        bad.add(NO_PARTNER, printable, str(images.get(stem) or labels[stem]))
    for stem in sorted(images.keys() & labels.keys()):
        yield Entry(str(images[stem]), str(labels[stem]))


def _by_stem(folder: Path, suffixes: tuple[str, ...], bad: Issues) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in _files(folder, suffixes):
        if path.stem in found:
            bad.add(
                SAME_STEM,
                "{} and {}".format,
                printable(str(found[path.stem])),
                printable(path.name),
            )
        found.setdefault(path.stem, path)
    return found


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.name.lower().endswith(suffixes)
        and not path.name.startswith(".")
        and not path.is_dir()
    )
