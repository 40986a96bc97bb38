"""A checked data set for semantic segmentation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cascade_det.data.image_names import NEAR_LINKS, LinkRule
from cascade_det.data.semantic.check import CheckedSemantic, check_semantic
from cascade_det.data.semantic.formats import SemanticSource
from cascade_det.data.semantic.reading import SemanticRecord
from cascade_det.errors import DatasetError

logger = logging.getLogger(__name__)

ON_BAD_DATA = "CASCADE.ON_BAD_DATA"


@dataclass(frozen=True, eq=False)
class SemanticDataset:
    """Images with labels of their pixels.

    Attributes:
        records: by file name, the slices of a volume in order; ``records[i].image_id`` is ``i``.
        source: where they were found; has ``class_names`` and ``ignore_value``.
        class_pixels: length K, pixels of each class.
        left_out: number of files left out, by kind of issue.
    """

    records: list[SemanticRecord]
    source: SemanticSource
    class_pixels: tuple[int, ...]
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Length K, in the order of the labels."""
        return self.source.class_names

    @property
    def ignore_value(self) -> int:
        """The label of pixels that no loss and no metric counts."""
        return self.source.ignore_value


def load_semantic_dataset(
    source: SemanticSource,
    on_bad_data: str = "error",
    *,
    decode: bool = False,
    links: LinkRule = NEAR_LINKS,
    share: tuple[int, int] = (0, 1),
    gather: Callable[[Any], list[Any]] = lambda findings: [findings],
) -> SemanticDataset:
    """Check the files of a data set; images themselves are read later.

    Args:
        source: from ``find_semantic_dataset``.
        on_bad_data: ``"error"`` raises if files are bad, and lists all of them; ``"skip"`` leaves
            them out and logs how many.
        decode: whether to decode each image file, so that none fails later.
        links: which links out of the folders are followed.
        share: (rank, number of processes) if several processes load the same data set.
        gather: maps the findings of this process to those of all processes, by rank.

    Raises:
        DatasetError: there is bad data that may not be skipped, or nothing else.
    """
    checked = check_semantic(source, decode=decode, share=share, gather=gather, links=links)
    if checked.bad and (on_bad_data == "error" or not checked.records):
        raise DatasetError(
            f"{source.folder}: bad data\n{checked.bad}\n"
            f"Fix these{'' if not checked.records else f', or set {ON_BAD_DATA} to skip them'}."
        )
    if share[0] == 0:  # all processes know the same
        _log(source, checked)
    return SemanticDataset(
        checked.records,
        source,
        tuple(checked.pixels[:-1].tolist()),
        left_out=dict(checked.bad.counts),
    )


def check_same_semantic_classes(datasets: Sequence[SemanticDataset]) -> None:
    """Check that data sets of one run have the same classes.

    Raises:
        DatasetError: the names of two of them differ.
    """
    for other in datasets[1:]:
        first = datasets[0]
        if other.class_names != first.class_names:
            raise DatasetError(
                f"data sets {first.source.name!r} and {other.source.name!r} have different "
                f"classes: {', '.join(first.class_names)}, and {', '.join(other.class_names)}. "
                "Give all sets of a run the same, in the same order."
            )


def _log(source: SemanticSource, checked: CheckedSemantic) -> None:
    if checked.bad:
        logger.warning("%s: left out\n%s", source.folder, checked.bad)
    if checked.notes:
        logger.warning("%s: perhaps a mistake\n%s", source.folder, checked.notes)
