"""Checks a data set, json and image files, before a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cascade_det.data.catalog import DatasetSource
from cascade_det.data.coco_json import CheckedJson, check_coco_json
from cascade_det.data.image_check import ImageEntry, find_bad_images
from cascade_det.data.image_names import NEAR_LINKS, LinkRule
from cascade_det.text import printable


def check_dataset(
    source: DatasetSource,
    *,
    decode: bool = False,
    share: tuple[int, int] = (0, 1),
    gather: Callable[[Any], list[Any]] = lambda findings: [findings],
    links: LinkRule = NEAR_LINKS,
) -> CheckedJson:
    """Check a json and the files of its images; images with a bad file are added to ``bad``.

    Args:
        source: the json and the folder of its images.
        decode: see :func:`find_bad_images`.
        share: see :func:`find_bad_images`.
        gather: see :func:`find_bad_images`.
        links: which links out of the image folder are followed.

    Raises:
        DatasetError: the json cannot be read.
    """
    checked = check_coco_json(source, links)
    entries = [
        ImageEntry(
            image_id, str(source.image_root), image["file_name"], image["height"], image["width"]
        )
        for image_id, image in checked.images.items()
    ]
    found = find_bad_images(
        entries,
        decode=decode,
        share=share,
        gather=gather,
        progress=f"checking the images of {printable(source.name)}",
    )
    for image_id in checked.images.keys() & found.keys():
        del checked.images[image_id]
    for _, (kind, detail) in sorted(found.items()):
        checked.bad.add(kind, str, detail)
    return checked
