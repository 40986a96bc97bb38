"""The page of a calibration, from the files of its folder."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cascade_det.calibration.assessment import CHOSEN
from cascade_det.calibration.comparison import FULL
from cascade_det.calibration.front_plot import KINDS
from cascade_det.calibration.page_result import Row, as_float, result_section
from cascade_det.errors import CascadeDetError
from cascade_det.report.pages.charts import Chart
from cascade_det.report.pages.line_charts import Line, line_chart
from cascade_det.report.pages.page import (
    NOTHING,
    REPORT_FILE,
    Folded,
    Grid,
    Plots,
    Section,
    number,
    write_page,
)

RECORD_FILE, COMPARISON_FILE = "calibration.json", "comparison.csv"
_COLORS = {
    "full cascade": "yellow",
    "oracles": "green",
    "random": "grey",
    "fewer stages or proposals": "orange",
}


def write_calibration_page(folder: Path, path: Path | None = None) -> Path:
    """Write ``report.html`` from the files that a calibration left in a folder.

    Args:
        folder: of the calibration of a detector or of a segmenter.
        path: of the page; by default in the folder.

    Returns:
        The path of the page.

    Raises:
        CascadeDetError: a file is missing, or cannot be used.
    """
    path = path or folder / REPORT_FILE
    try:
        record = json.loads(_text(folder / RECORD_FILE))
        rows = _table(folder / COMPARISON_FILE)
        of_maps = "decoder" in rows[0]
        parts = _of_segmenter(record, rows, folder) if of_maps else _of_detector(rows, folder)
        sections = [
            result_section(record, rows, _text(folder / "exits.yaml")),
            *parts,
            Section("record", "Record and machine", list(_origin(record))),
        ]
        facts = list(_facts(record))
        title = f"Calibration on {record['data']['name']}"
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise CascadeDetError(
            f"{folder}: its files are not of a calibration of this version, which a report could "
            f"show ({type(error).__name__}: {error}). Calibrate again."
        ) from error
    write_page(path, title, facts, sections)
    return path


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CascadeDetError(f"{file}: there is no such file. Calibrate first.") from None


def _table(file: Path) -> list[Row]:
    return list(csv.DictReader(_text(file).splitlines()))


def _facts(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    expected = record["expected"]
    for name, value in expected.items():
        if name in ("AP", "segm/AP") or name.endswith(" (%)"):
            yield name.removesuffix(" (%)"), number(value, ".2f")
    change = expected.get("AP_change", expected.get("change"))
    yield "change", number(change, "+.2f")
    if "work" in expected:
        yield "work of the heads left", f"{100 * expected['work']:.1f} %"
    if "model share" in expected:
        yield "time left", f"{100 * expected['model share']:.1f} %"
    yield "images", f"{record['images']['reported_on']:,}"


def _of_detector(rows: Sequence[Row], folder: Path) -> Iterator[Section]:
    front = _table(folder / "front.csv")
    metric = next(iter(front[0])).removesuffix(" (%)")
    change = f"{metric} change"
    charts = [
        _front_chart(front, rows, change, "head FLOPs left", "head FLOPs left", 100),
        _front_chart(front, rows, change, "ms/image (measured)", "ms/image", 1),
    ]
    text = (
        "The front are the settings to choose from, from safe to risky, on the images that judge. "
        f"Change of {metric} against the full cascade; the bar is a 95 % interval of the paired "
        "bootstrap over images, in which every resample chooses again."
    )
    yield Section("front", "Front and competitors", [text, Plots([c for c in charts if c])])
    cells = [_compared(row, change, metric) for row in rows]
    headers = list(cells[0])
    marked = frozenset(i for i, row in enumerate(rows) if row["exits"] == CHOSEN)
    values = [list(row.values()) for row in cells]
    compared = Section("comparison", "Comparison", [Grid("", headers, values, marked)])
    if (folder / "masks.csv").is_file():
        compared.blocks.append(_plain_grid("Fewer masks with these exits", folder / "masks.csv"))
    yield compared
    yield Section(
        "points",
        "Points of the front",
        [Folded(f"{len(front)} settings", [_plain_grid("", folder / "front.csv")])],
    )


def _front_chart(
    front: Sequence[Row],
    rows: Sequence[Row],
    change: str,
    front_cost: str,
    cost: str,
    scale: float,
) -> Chart | None:
    metric = change.removesuffix(" change")
    pairs = ((scale * as_float(r[front_cost]), -as_float(r[f"{metric} drop"])) for r in front)
    points = sorted(pair for pair in pairs if math.isfinite(pair[0]))  # The rest was not measured.
    if not points:
        return None
    lines = [Line("front", points, "blue", dots="all")]
    by_kind: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows:
        name = row["exits"]
        label = next(label for start, label, *_ in KINDS if name.startswith(start))
        label = name if name in (CHOSEN, FULL) else label
        at = scale * as_float(row[cost]), as_float(row[change])
        by_kind.setdefault(label, []).append((*at, name))
    for label, found in by_kind.items():
        places = [(x, y) for x, y, _ in found]
        names = [name for *_, name in found]
        if label == CHOSEN:
            row = next(row for row in rows if row["exits"] == label)
            errors = [(as_float(row[f"{change} low"]), as_float(row[f"{change} high"]))]
            lines.append(Line(label, places, "red", dots="only", texts=names, errors=errors))
        else:
            color = _COLORS.get(label, "purple")
            # Hollow, so that a point of the front below can be seen.
            lines.append(Line(label, places, color, dots="only", texts=names, hollow=True))
    is_time = cost == "ms/image"
    title = "Change against time" if is_time else "Change against the work of the heads"
    return line_chart(
        title,
        lines,
        x_label="ms per image, measured" if is_time else "FLOPs of the heads (% of the cascade)",
        y_label=f"{metric} change",
        log_x=not is_time,
    )


def _compared(row: Row, change: str, metric: str) -> dict[str, str]:
    entered = [v for name, v in row.items() if name.startswith("regions/image in stage")]
    return {
        "exits": row["exits"],
        f"{metric} (%)": number(as_float(row[f"{metric} (%)"]), ".2f"),
        "change [95 %]": _interval(row, change),
        "regions per image in each stage": " / ".join(f"{as_float(v):.0f}" for v in entered),
        "head FLOPs left (%)": number(100 * as_float(row["head FLOPs left"]), ".1f"),
        "ms/image": number(as_float(row["ms/image"]), ".1f"),
        "lost (%)": number(100 * as_float(row["lost"]), ".2f"),
    }


def _interval(row: Row, change: str) -> str:
    value, low, high = (as_float(row[f"{change}{end}"]) for end in ("", " low", " high"))
    return NOTHING if math.isnan(value) else f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def _of_segmenter(
    record: Mapping[str, Any], rows: Sequence[Row], folder: Path
) -> Iterator[Section]:
    metric = list(rows[0])[1]
    kinds = {"chosen": "red", "patch": "green", "image": "blue"}
    lines = []
    for kind, color in [*kinds.items(), ("others", "grey")]:
        found = [row for row in rows if _kind_of(row, kinds) == kind]
        points = [(100 * as_float(row["model share"]), as_float(row[metric])) for row in found]
        names = [row["decoder"] for row in found]
        if points:
            lines.append(Line(kind, points, color, dots="only", texts=names))
    chart = line_chart(
        f"{metric} against time",
        lines,
        x_label="time of the whole model (% of no exits)",
        y_label=metric,
    )
    marked = frozenset(i for i, row in enumerate(rows) if row["chosen"] == "1")
    cells = [_decoder(row, metric) for row in rows]
    yield Section(
        "comparison",
        "Competitors",
        [
            "Smaller decoders, smaller images and an oracle beside exits of patches and images.",
            Plots([chart]),
            Grid("", list(cells[0]), [list(row.values()) for row in cells], marked),
        ],
    )
    if (folder / "trials.csv").is_file():
        trials = _plain_grid("", folder / "trials.csv")
        summary = f"{record['trials']:,} settings, on the search half"
        yield Section("points", "Trials", [Folded(summary, [trials])])


def _decoder(row: Row, metric: str) -> dict[str, str]:
    return {
        "decoder": row["decoder"],
        metric: number(as_float(row[metric]), ".2f"),
        "change [95 %]": _interval(row, "change"),
        "later levels (%)": number(100 * as_float(row["later levels computed"]), ".1f"),
        "decoder (ms)": number(as_float(row["decoder ms/image"]), ".1f"),
        "model (ms)": number(as_float(row["model ms/image"]), ".1f"),
        "of no exits (%)": number(100 * as_float(row["model share"]), ".1f"),
        "right pixels lost (%)": number(100 * as_float(row["right pixels lost"]), ".2f"),
    }


def _kind_of(row: Row, kinds: Mapping[str, str]) -> str:
    first = row["decoder"].split()[0]
    return "chosen" if row["chosen"] == "1" else first if first in kinds else "others"


def _origin(record: Mapping[str, Any]) -> Iterator[Grid]:
    for title, key in (
        ("Weights", "weights"),
        ("Data", "data"),
        ("Measured on", "machine"),
        ("Latency model", "latency_model"),
    ):
        if entries := record.get(key):
            rows = [(name, number(value, ".4g")) for name, value in _flat(entries)]
            yield Grid(title, ("", ""), rows, of_text=True)


def _flat(entries: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in entries.items():
        yield name, str(value) if isinstance(value, list | dict) else value


def _plain_grid(title: str, file: Path) -> Grid:
    rows = _table(file)
    cells = [[number(_cell(value), ".4g") for value in row.values()] for row in rows]
    return Grid(title, list(rows[0]) if rows else [""], cells)


def _cell(text: str) -> Any:
    try:
        value = float(text)
    except ValueError:
        return text or None
    return int(value) if value.is_integer() and abs(value) < 1e15 else value
