"""A run from its list of images to its files."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass

from fvcore.common.config import CfgNode
from tqdm import tqdm

from cascade_det.offline.folder import OutputFolder
from cascade_det.offline.images import Entry
from cascade_det.offline.parquet import pyarrow, read_rows
from cascade_det.offline.plan import PARTS, Part, cut, missing_parts, model_identity, open_run
from cascade_det.offline.worker import Counts, Job

Engine = Callable[[Job, Sequence[Part]], Generator[Counts, None, None]]


@dataclass
class Summary:
    """What a run did.

    Attributes:
        parts: of the run, those of others' shares included.
        found_done: parts that were there at the start.
        missing: parts that are not there at the end.
        images: that were detected in.
        failed: those of them whose rows have an error.
        failed_before: rows with an error in the parts of this share that were there at the start.
        detections: in them.
    """

    parts: int
    found_done: int
    missing: int = 0
    images: int = 0
    failed: int = 0
    failed_before: int = 0
    detections: int = 0


def detect_in_parts(
    cfg: CfgNode,
    entries: Sequence[Entry],
    output: str,
    engine: Engine,
    *,
    part_size: int,
    readers: int,
    share: tuple[int, int] = (1, 1),
) -> Summary:
    """Detect in images and write the files of all parts that are not there yet.

    Args:
        cfg: a checked configuration with weights.
        entries: the images.
        output: folder, a path or an address; made if missing, or of an earlier start of this run.
        engine: makes the files of parts.
        part_size: images per part.
        readers: threads per process that read images.
        share: ``(k, n)`` does only the k-th of n shares of the parts, k from 1 on.

    Raises:
        DatasetError: the folder is of another run.
        CascadeDetError: the run cannot start or go on; finished parts stay.
    """
    pyarrow()
    model = model_identity(cfg)
    folder = OutputFolder(output)
    parts = cut(entries, part_size, model)
    open_run(folder, parts, model)
    names = [part.name for part in parts]
    missing = set(missing_parts(folder, names))
    own = parts[share[0] - 1 :: share[1]]
    todo = [part for part in own if part.name in missing]
    summary = Summary(len(parts), len(parts) - len(missing))
    if todo:
        job = Job(cfg, model, folder.address("").rstrip("/"), readers)
        # Closed also after Ctrl-C between two parts: its processes would go on.
        with closing(engine(job, todo)) as finished:
            _run(finished, todo, summary)
        summary.missing = len(missing_parts(folder, names))
    else:
        summary.missing = len(missing)
    for part in own:
        if part.name not in missing:
            rows = read_rows(folder.address(f"{PARTS}/{part.name}"), ["error"])
            summary.failed_before += sum(row["error"] is not None for row in rows)
    return summary


def _run(finished: Iterable[Counts], todo: Sequence[Part], summary: Summary) -> None:
    total = sum(len(part.entries) for part in todo)
    with tqdm(total=total, disable=None, unit="img") as bar:
        for counts in finished:
            summary.images += counts.images
            summary.failed += counts.failed
            summary.detections += counts.detections
            bar.update(counts.images)
