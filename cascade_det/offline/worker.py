"""Detects in the images of a part and writes its file: what every engine's processes do."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode

from cascade_det import __version__
from cascade_det.core import Detections
from cascade_det.data.coco_results import encode_masks
from cascade_det.data.transforms import Pixels
from cascade_det.errors import CheckpointError
from cascade_det.offline.folder import OutputFolder
from cascade_det.offline.images import Entry
from cascade_det.offline.parquet import write_rows
from cascade_det.offline.plan import PARTS, Part, model_identity
from cascade_det.offline.reading import Reader
from cascade_det.standalone import Predictor
from cascade_det.text import printable

logger = logging.getLogger(__name__)

# How often a part is tried when the process that detects in it dies each time.
MOST_TRIES = 3
_NO_DETECTIONS = ("boxes", "scores", "classes", "category_ids", "exit_stages")


@dataclass(frozen=True)
class Job:
    """What a process needs to know; it can be pickled.

    Attributes:
        cfg: a checked configuration with weights that the process can read.
        model: of :func:`plan.model_identity` where the run was planned.
        output: address of the folder of the run.
        readers: threads that read images.
    """

    cfg: CfgNode
    model: Mapping[str, Any]
    output: str
    readers: int


@dataclass(frozen=True)
class Counts:
    """What a finished part has: images, those of them that failed, and detections."""

    images: int
    failed: int
    detections: int


class PartWorker:
    """A predictor that makes the files of parts.

    Args:
        job: see there.

    Raises:
        CheckpointError: the weights here are others than where the run was planned.
        CascadeDetError: the predictor cannot be built.
    """

    def __init__(self, job: Job) -> None:
        self._model, self._folder = job.model, OutputFolder(job.output)
        if model_identity(job.cfg) != job.model:
            raise CheckpointError(
                f"{job.cfg.MODEL.WEIGHTS}: holds other weights in this process than where the run "
                "was planned. All machines must see the same file."
            )
        self._reader = Reader(job.readers)
        self._predictor = Predictor(job.cfg)

    def run(self, part: Part) -> Counts:
        """Detect in all images of a part and write its file.

        Raises:
            CascadeDetError: the file cannot be written.
        """
        rows = list(detected(self._predictor, self._reader, part.entries))
        metadata = {**self._model, "version": __version__, "torch": torch.__version__}
        self._folder.write(f"{PARTS}/{part.name}", write_rows(rows, metadata))
        found = sum(len(row["scores"]) for row in rows)
        return Counts(len(rows), sum(row["error"] is not None for row in rows), found)


def detected(
    predictor: Predictor, reader: Reader, entries: Sequence[Entry]
) -> Iterator[dict[str, Any]]:
    """A row of ``parquet.prediction_schema`` for each image, in order.

    Images are read ahead of the detector, and batched as ``predict`` does.
    """
    for batch in reader.batches(entries, predictor.batch_size):
        images = [(e, pixels) for e, pixels in batch if not isinstance(pixels, str)]
        results = iter(_detect(predictor, images))
        for entry, pixels in batch:
            if isinstance(pixels, str):
                yield _row(entry, error=pixels)
                continue
            found, milliseconds = next(results)
            yield (
                _row(entry, pixels, error=found)
                if isinstance(found, str)
                else _row(entry, pixels, **_columns(found, pixels, predictor.category_ids))
                | {"milliseconds": milliseconds}
            )


def _detect(
    predictor: Predictor, images: Sequence[tuple[Entry, Pixels]]
) -> list[tuple[Detections | str, float | None]]:
    """Detections of each image, and its share of the milliseconds; a batch too large is split."""
    if not images:
        return []
    start = time.perf_counter()
    try:
        found = predictor([pixels for _, pixels in images], names=[e.path for e, _ in images])
    except (MemoryError, torch.OutOfMemoryError) as error:
        if len(images) == 1:
            path = printable(images[0][0].path)
            logger.warning("%s: does not fit into memory", path)
            return [(f"does not fit into memory: {error}", None)]
        return [result for image in images for result in _detect(predictor, [image])]
    each = 1000 * (time.perf_counter() - start) / len(images)
    return [(detections, each) for detections in found]


def _columns(found: Detections, pixels: Pixels, category_ids: Sequence[int]) -> dict[str, Any]:
    classes = found.classes.tolist()
    return {
        "boxes": np.asarray(found.boxes).tolist(),
        "scores": found.scores.tolist(),
        "classes": classes,
        "category_ids": [category_ids[index] for index in classes],
        "exit_stages": found.exit_stages.tolist(),
        "masks": encode_masks(found, *pixels.shape[:2]),
    }


def _row(
    entry: Entry, pixels: Pixels | None = None, *, error: str | None = None, **columns: Any
) -> dict[str, Any]:
    height, width = (None, None) if pixels is None else pixels.shape[:2]
    return {
        "id": entry.id,
        "path": _text(entry.path),
        "height": height,
        "width": width,
        **{name: [] for name in _NO_DETECTIONS},
        "masks": None,
        "milliseconds": None,
        "error": None if error is None else _text(error),
        **columns,
    }


def _text(text: str) -> str:
    r"""Valid Unicode: bytes of a file name that are not become text such as ``\udcf6``."""
    return text.encode("utf-8", "backslashreplace").decode()
