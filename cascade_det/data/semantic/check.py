"""Checks a data set for semantic segmentation before a run, and counts its pixels by class."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from cascade_det.data.catalog import DatasetSource
from cascade_det.data.image_headers import image_size
from cascade_det.data.image_names import NEAR_LINKS, LinkRule, name_guard
from cascade_det.data.issues import Issues, shown
from cascade_det.data.semantic.arrays import open_arrays
from cascade_det.data.semantic.formats import FORMATS, H5, Entry, SemanticSource, list_entries
from cascade_det.data.semantic.reading import (
    Labels,
    SemanticRecord,
    grey_levels,
    new_labels,
    read_label_image,
    whole_labels,
)
from cascade_det.errors import DatasetError
from cascade_det.text import printable

UNUSABLE = "file that cannot be used"
SIZES_DIFFER = "image whose label image has another size"
OUTSIDE = "label that is neither a class nor ignored"
ODD_RANGE = "grey levels outside [0, 1]: is the CT window or normalisation right?"
_LABELS_SHOWN = 5


class _Findings(NamedTuple):
    """What a file holds, or (kind, detail) of why it cannot be used."""

    issue: tuple[str, str] | None
    size: tuple[int, int] = (0, 0)
    num_slices: int | None = None
    # By class, ignored pixels last: pixels, and images or slices with a pixel.
    pixels: npt.NDArray[np.int64] | None = None
    images: npt.NDArray[np.int64] | None = None
    odd_range: str = ""


@dataclass
class CheckedSemantic:
    """A data set and what is wrong with it.

    Attributes:
        records: the usable images and slices.
        bad: files that cannot be used.
        notes: unusual things that do not prevent use.
        pixels: int64 ``[K + 1]``, pixels by class, ignored ones last.
        images: int64 ``[K + 1]``, images with a pixel of each class.
    """

    records: list[SemanticRecord]
    pixels: npt.NDArray[np.int64]
    images: npt.NDArray[np.int64]
    bad: Issues = field(default_factory=Issues)
    notes: Issues = field(default_factory=Issues)


def check_semantic(
    source: SemanticSource,
    *,
    decode: bool = False,
    share: tuple[int, int] = (0, 1),
    gather: Callable[[Any], list[Any]] = lambda findings: [findings],
    links: LinkRule = NEAR_LINKS,
) -> CheckedSemantic:
    """Check the files of a data set: all labels, and all arrays, are read.

    Args:
        source: the data set.
        decode: whether to decode image files too, and not only read their headers and ends.
        share: (rank, number of processes) if several processes check a part each.
        gather: maps the findings of this process to those of all processes, by rank.
        links: which links out of the folders are followed.

    Raises:
        DatasetError: no file belongs to the data set.
    """
    bad = Issues()
    entries = list_entries(source, bad)
    rank, processes = share
    parts = gather(_find(source, entries[rank::processes], decode, links, silent=bool(rank)))
    classes = len(source.class_names) + 1
    checked = CheckedSemantic([], np.zeros(classes, np.int64), np.zeros(classes, np.int64), bad)
    for index, entry in enumerate(entries):
        found: _Findings = parts[index % processes][index // processes]
        if found.issue is not None:
            kind, detail = found.issue
            bad.add(kind, str, detail)
            continue
        assert found.pixels is not None
        assert found.images is not None
        checked.pixels += found.pixels
        checked.images += found.images
        if found.odd_range:
            checked.notes.add(
                ODD_RANGE, "{}: {}".format, printable(entry.file_name), found.odd_range
            )
        checked.records += _records(source, entry, found, len(checked.records))
    for name, count in zip(source.class_names, checked.pixels, strict=False):
        if checked.records and not count:
            checked.notes.add("class without a pixel", shown, name)
    return checked


def _records(
    source: SemanticSource, entry: Entry, found: _Findings, first_id: int
) -> list[SemanticRecord]:
    slices = [None] if found.num_slices is None else list(range(found.num_slices))
    volume = ""
    if found.num_slices is not None:
        name = Path(entry.file_name).name
        volume = name[: -len(H5)] if name.lower().endswith(H5) else Path(name).stem
    return [
        SemanticRecord(
            file_name=entry.file_name,
            image_id=first_id + number,
            height=found.size[0],
            width=found.size[1],
            format=source.format,
            label_file=entry.label_file,
            volume=volume,
            slice_index=slice_index,
        )
        for number, slice_index in enumerate(slices)
    ]


def _find(
    source: SemanticSource,
    entries: Sequence[Entry],
    decode: bool,
    links: LinkRule,
    *,
    silent: bool,
) -> list[_Findings]:
    folders = [folder for folder in (source.folder, source.label_folder) if folder is not None]
    # A link near its folder is one to below the folder's parent.
    guards = [name_guard(DatasetSource(source.name, place, place), links) for place in folders]

    def check(entry: Entry) -> _Findings:
        for guard, path in zip(guards, (entry.file_name, entry.label_file), strict=False):
            if escape := guard(os.path.basename(path)):
                return _Findings(escape)
        try:
            if entry.label_file:
                return _check_images(source, entry, decode)
            return _check_arrays(source, entry)
        except DatasetError as error:
            return _Findings((UNUSABLE, str(error)))

    Image.init()  # not safe in several threads at once
    title = f"checking the labels of {printable(source.name)}"
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # Pillow's; the filters are global to all threads
        try:
            results = pool.map(check, entries)
            bar = tqdm(results, title, len(entries), delay=2, disable=silent or None, unit="img")
            return list(bar)
        finally:  # when interrupted, do not check the rest first
            pool.shutdown(cancel_futures=True)


def _check_images(source: SemanticSource, entry: Entry, decode: bool) -> _Findings:
    labels = read_label_image(entry.label_file, is_mask=FORMATS[source.format].is_mask)
    size = image_size(entry.file_name, decode=decode)
    height, width = labels.shape
    if size != (height, width):
        sizes = f"{size[1]}x{size[0]}, not {width}x{height} as {printable(entry.label_file)}"
        return _Findings((SIZES_DIFFER, f"{printable(entry.file_name)}: {sizes}"))
    counts = np.bincount(labels.ravel(), minlength=256)[None]  # [slices, labels]
    return _counted(source, entry.label_file, counts, size, None)


def _check_arrays(source: SemanticSource, entry: Entry) -> _Findings:
    how = FORMATS[source.format]
    assert how.keys is not None
    path, lowest, highest = entry.file_name, 0.0, 0.0
    counts = []
    with open_arrays(path, how.keys) as arrays:
        for index in [None] if arrays.num_slices is None else range(arrays.num_slices):
            image, numbers = arrays.slice(index)
            levels = grey_levels(image, path)
            lowest, highest = min(lowest, levels.min()), max(highest, levels.max())
            labels: Labels = whole_labels(numbers, path)
            counts.append(np.bincount(labels.ravel(), minlength=256))
        size = arrays.shape[-2:]
        found = _counted(source, path, np.stack(counts), size, arrays.num_slices)
    if lowest < -0.5 or highest > 255.5:
        found = found._replace(odd_range=f"{lowest / 255:.3g} to {highest / 255:.3g}")
    return found


def _counted(
    source: SemanticSource,
    path: str,
    counts: npt.NDArray[np.int64],
    size: tuple[int, ...],
    num_slices: int | None,
) -> _Findings:
    """Findings from the pixels by label in the file, ``[slices, 256]``."""
    how, classes = FORMATS[source.format], len(source.class_names)
    known = len(how.new_label) or classes
    outside = [k for k in np.flatnonzero(counts.sum(0)) if k >= known and k != source.ignore_value]
    if outside:
        labels = ", ".join(map(str, outside[:_LABELS_SHOWN]))
        more = ", ..." * (len(outside) > _LABELS_SHOWN)
        detail = f"{printable(path)}: {labels}{more} (classes are 0 to {known - 1})"
        return _Findings((OUTSIDE, detail))
    new = new_labels(np.arange(256, dtype=np.uint8), how).astype(np.int64)
    new[source.ignore_value] = classes
    by_class = np.zeros((len(counts), classes + 1), np.int64)
    for label in np.flatnonzero(counts.sum(0)):
        by_class[:, new[label]] += counts[:, label]
    height, width = size
    pixels, images = by_class.sum(0), (by_class > 0).sum(0)
    return _Findings(None, (height, width), num_slices, pixels, images)
