"""The page of an evaluation, from the files of its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cascade_det.errors import CascadeDetError
from cascade_det.report.pages.detections import ReadImage, detection_sections
from cascade_det.report.pages.page import REPORT_FILE, Grid, Section, number, write_page
from cascade_det.report.pages.segmentation import segmentation_sections
from cascade_det.report.pages.training import training_section
from cascade_det.report.pages.work import work_sections
from cascade_det.report.tables import Metrics
from cascade_det.report.text import RESULTS_FILE, report_sections

_LONGEST_VALUE = 300  # Characters of a value of the configuration.


def write_evaluation_page(
    folder: Path,
    *,
    results: Metrics | None = None,
    read_image: ReadImage | None = None,
    path: Path | None = None,
) -> Path:
    """Write ``report.html`` from the files of an evaluation.

    Args:
        folder: of the evaluation; its ``metrics.json``, or that of the run above, gives the curves
            of the training, ``analysis/`` the pictures of a segmenter.
        results: by default the content of ``results.json``.
        read_image: see ``report.analysis_files.write_analysis``; without it the worst images of a
            detector are not shown.
        path: of the page; by default in the folder.

    Returns:
        The path of the page.

    Raises:
        CascadeDetError: there are no results, or they cannot be used.
    """
    path = path or folder / REPORT_FILE
    file = folder / RESULTS_FILE
    found = read_results(file) if results is None else results
    try:
        title, facts, sections = _contents(found, folder, read_image)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CascadeDetError(
            f"{file}: is not of an evaluation of this version, which a report could show "
            f"({type(error).__name__}: {error}). Evaluate again."
        ) from error
    write_page(path, title, facts, sections)
    return path


def read_results(file: Path) -> dict[str, Any]:
    """The results of an evaluation, where a number that is not defined is nan.

    Raises:
        CascadeDetError: the file is missing, or is not of an evaluation.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CascadeDetError(f"{file}: there is no such file. Evaluate first.") from None
    except (ValueError, RecursionError) as error:
        raise CascadeDetError(f"{file}: is not JSON: {error}") from error
    if not isinstance(content, dict) or not content.keys() & {"bbox", "sem_seg"}:
        raise CascadeDetError(
            f"{file}: has neither the key 'bbox' nor 'sem_seg', of which an evaluation writes one"
        )
    results: dict[str, Any] = _with_nan(content)
    return results


def _with_nan(value: Any) -> Any:
    """JSON has no nan: it is null there."""
    if isinstance(value, dict):
        return {key: _with_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return math.nan if value is None else value


def _contents(
    results: Metrics, folder: Path, read_image: ReadImage | None
) -> tuple[str, list[tuple[str, str]], list[Section]]:
    texts = report_sections(results)
    data = results.get("data") or {}
    title = f"Evaluation on {data['name']}" if "name" in data else "Evaluation"
    own = (
        segmentation_sections(results, texts, folder)
        if "sem_seg" in results
        else detection_sections(results, texts, read_image)
    )
    sections = [
        _warnings(results),
        *own,
        *work_sections(results, texts),
        training_section(folder),
        config_section(results.get("config")),
        _origin(results),
    ]
    return title, list(_facts(results)), sections


def _facts(results: Metrics) -> Iterator[tuple[str, str]]:
    """The figures that a reader wants first."""
    for task, name in (("bbox", "box AP"), ("segm", "mask AP")):
        if metrics := results.get(task):
            for metric in ("AP", "AP50", "AP75") if task == "bbox" else ("AP",):
                yield name.replace("AP", metric), number(metrics.get(metric), ".1f")
    if metrics := results.get("sem_seg"):
        yield "mean IoU", number(metrics.get("mIoU"), ".1f")
    if analysis := results.get("analysis"):
        yield "best F1", number(analysis["overall"][1]["F1"], ".1f")
    if exits := results.get("exits"):
        yield "stages per region", number(exits.get("stages_per_region"), ".2f")
    if total := (results.get("latency") or {}).get("total"):
        yield "ms per image", number(total["median_ms"], ".1f")


def _warnings(results: Metrics) -> Section:
    notes = [*results.get("notes", ()), *(results.get("latency") or {}).get("notes", ())]
    return Section("warnings", "Warnings", notes)


def config_section(changes: Mapping[str, Any] | None) -> Section:
    """The keys whose values are not the defaults."""
    section = Section("configuration", "Configuration")
    if changes:
        rows = [(key, _value(default), _value(own)) for key, (default, own) in changes.items()]
        section.blocks.append(
            Grid("Keys that differ", ("key", "default", "this run"), rows, of_text=True)
        )
    return section


def _value(value: Any) -> str:
    text = value if isinstance(value, str) and value else repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def _origin(results: Metrics) -> Section:
    section = Section("origin", "Data and machine")
    for title, key in (("Data", "data"), ("Measured on", "machine")):
        if entries := results.get(key):
            rows = [(name, number(value)) for name, value in entries.items()]
            section.blocks.append(Grid(title, ("", ""), rows, of_text=True))
    return section
