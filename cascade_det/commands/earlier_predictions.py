"""What earlier runs of ``predict`` left in a folder: only that may be replaced."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cascade_det.commands.arguments import file_identity
from cascade_det.data.annotation_file import read_json
from cascade_det.data.coco_results import PREDICTIONS_FILE
from cascade_det.errors import DatasetError
from cascade_det.text import listed

# One object per line: first {"pictures": [...]}, then one per image, and another {"pictures": ...}
# before files that the first line did not name. It exists during a run, and remains if the run is
# killed.
LINES_FILE = "predictions.jsonl"
# The endings of the files of an image or a video, by their keys in the json.
SUFFIXES = {"picture": ".jpg", "labels": ".png", "video": ".mp4"}

_MOST_SHOWN = 5


def made_before(folder: Path) -> list[str]:
    """Names of the files that earlier runs made in a folder, according to their results."""
    made: list[Any] = []
    if os.path.lexists(folder / PREDICTIONS_FILE):
        made += _named_by(folder / PREDICTIONS_FILE)
    if not (folder / LINES_FILE).stat().st_size:
        made.append(LINES_FILE)
    for number, line in enumerate(read_lines(folder / LINES_FILE)):
        if isinstance(line.get("pictures"), list):
            made += [LINES_FILE, *line["pictures"], *_list(line.get("others"))]
        elif number == 0:
            break  # not of a run
    return [name for name in made if isinstance(name, str) and name == os.path.basename(name)]


def _named_by(path: Path) -> list[Any]:
    try:
        content = read_json(path)
    except DatasetError:
        return []
    if not isinstance(content, dict) or not {"images", "failed"} <= content.keys():
        return []
    entries = [*_list(content["images"]), *_list(content.get("videos"))]
    entries = [entry for entry in entries if isinstance(entry, dict)]
    pictures = [entry.get(key) for entry in entries for key in SUFFIXES]
    older, others = (_list(content.get(key)) for key in ("older_pictures", "others"))
    return [path.name, *pictures, *older, *others]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def other_files(names: Iterable[str]) -> list[str]:
    """Names of files that are neither of an image nor results, each once."""
    known = (PREDICTIONS_FILE, LINES_FILE)
    return [n for n in dict.fromkeys(names) if n not in known and not is_of_image(n)]


def is_of_image(name: str) -> bool:
    """Whether a name has the ending of a picture, a label image or a video."""
    return name.endswith(tuple(SUFFIXES.values()))


def check_replaced(
    folder: Path, names: Iterable[str], inputs: Iterable[Path], made: Sequence[str]
) -> None:
    """Raise DatasetError if one of these files is an input, or was made by others."""
    inputs_by_identity = {file_identity(file): file for file in inputs}
    ours, foreign = set(made), []
    for name in names:
        path = folder / name
        if not os.path.lexists(path):
            continue
        if (replaced := inputs_by_identity.get(file_identity(path))) and path.exists():
            raise DatasetError(
                f"--output {folder}: {name} would replace the input {replaced}. Give another "
                "folder."
            )
        if name not in ours:
            foreign.append(name)
    if foreign:
        raise DatasetError(
            f"--output {folder}: {listed(foreign, _MOST_SHOWN)} would be replaced, and was not "
            "made by an earlier run. Give another folder, or move it away."
        )


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of lines; skips lines that are not objects, such as truncated ones."""
    with path.open("rb") as file:
        for line in file:
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(content, dict):
                yield content
