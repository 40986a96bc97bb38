"""Weights of a file -> parameters of a model, with a report of what went where."""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from cascade_det.errors import CheckpointError
from cascade_det.text import listed
from cascade_det.weights.completeness import check_complete, check_finite
from cascade_det.weights.files import WeightsFile, read_weights, read_weights_file

__all__ = ["LoadReport", "ShapeMismatch", "load_weights", "read_weights"]

logger = logging.getLogger(__name__)

# Nobody misses these: the configuration sets the pixel statistics, anchors are computed, and the
# count of batches only matters to a BatchNorm without momentum.
_UNIMPORTANT = re.compile(
    r"(^|\.)num_batches_tracked$|(^|\.)pixel_(mean|std)$|anchor_generator\.cell_anchors"
)


@dataclass(frozen=True)
class ShapeMismatch:
    """A parameter that stays as initialised, because the file's has another shape."""

    name: str
    in_file: tuple[int, ...]
    in_model: tuple[int, ...]


@dataclass
class LoadReport:
    """What became of the weights of a file. ``str(report)`` is for reading.

    Attributes:
        path: the local file.
        origin: whose names it used: "Detectron2", "Caffe2" or "torchvision".
        loaded: names of the model's tensors that were set.
        total: how many tensors the model has.
        reinitialised: tensors left as initialised because the shapes differ.
        missing: the model's names that the file does not have.
        unexpected: the file's names that the model has no place for.
        ambiguous: the file's names that fit several places of the model, and were left out.
        hint: what a user of such a file has to know; may be empty.
    """

    path: Path
    origin: str
    total: int
    hint: str = ""
    loaded: list[str] = field(default_factory=list)
    reinitialised: list[ShapeMismatch] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    ambiguous: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        known_here = [*self.loaded, *self.missing, *(m.name for m in self.reinitialised)]
        sections = (
            (
                "initialised anew, the shape differs (another number of classes?)",
                [
                    f"{m.name}: {m.in_file} in the file, {m.in_model} here"
                    for m in self.reinitialised
                ],
            ),
            ("not in the file, left as initialised", _by_module(self.missing, self.loaded)),
            ("no place in this model, left out", _by_module(self.unexpected, known_here)),
            ("fits several places of this model, left out", self.ambiguous),
        )
        lines = [
            f"Weights from {self.path} ({self.origin} names): "
            f"{len(self.loaded)} of the model's {self.total} tensors loaded."
        ]
        for title, entries in sections:
            if entries:
                lines += [f"  {title}:", *(f"    {entry}" for entry in entries)]
        if self.hint:
            lines.append(f"  {self.hint}")
        return "\n".join(lines)


def load_weights(model: nn.Module, path: str | Path, *, complete: bool = False) -> LoadReport:
    """Set the parameters and buffers of ``model`` that ``path`` has values for.

    Names are matched exactly. A file that lacks prefixes (a backbone alone, Caffe2's or
    torchvision's names) is matched by the longest suffix, as Detectron2 does. Tensors of another
    shape are left as they are.

    Args:
        model: its state dict has Detectron2's names.
        path: a file or an address, see :func:`cascade_det.weights.addresses.local_path`.
        complete: whether a part of the model that is not in the file, or has another shape there,
            is an error, as for a model that is not trained any more.

    Returns:
        The report, which has also been logged.

    Raises:
        CheckpointError: the file cannot be had or read, nothing in it fits the model, it holds NaN
            or Inf, or it is not complete.
    """
    file = read_weights_file(path)
    state = model.state_dict()
    values, report = _match(file, state)
    if not values:
        # With the shapes, where these are what differs.
        in_file = [f"{m.name} {m.in_file}" for m in report.reinitialised] or file.weights
        in_model = [f"{m.name} {m.in_model}" for m in report.reinitialised] or state
        has, wants = listed(sorted(in_file), 3), listed(sorted(in_model), 3)
        raise CheckpointError(
            f"{path}: nothing in it fits this model. The file has {has}; the model wants {wants}. "
            "Check that the file belongs to this architecture."
        )
    statistics = _unit_statistics(values, state)
    # A number may be too large for the type here alone.
    check_finite(path, {name: value.to(state[name].dtype) for name, value in values.items()})
    if complete:
        mismatched = {m.name: (m.in_file, m.in_model) for m in report.reinitialised}
        missing = [*report.missing, *statistics]
        check_complete(path, report.loaded, missing, mismatched, report.unexpected)
    model.load_state_dict({**statistics, **values}, strict=False)
    logger.info("%s", report)
    return report


def _match(file: WeightsFile, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], LoadReport]:
    weights = {k: v for k, v in file.weights.items() if not _is_pixel_statistic(k)}
    by_suffix = file.matches_by_suffix or not (weights.keys() & state.keys())
    total = sum(not _UNIMPORTANT.search(name) for name in state)
    report = LoadReport(file.path, file.origin, total, file.hint)
    sources = dict(_sources(state, weights, by_suffix))

    fitting, used = defaultdict(list), set(sources.values())
    for name, source in sources.items():
        in_file, in_model = tuple(weights[source].shape), tuple(state[name].shape)
        if in_file == in_model:
            fitting[source].append(name)
        else:
            report.reinitialised.append(ShapeMismatch(name, in_file, in_model))

    values = {}
    for source, names in fitting.items():
        if len(names) == 1:
            values[names[0]] = weights[source]
        else:
            report.ambiguous.append(source)
    report.loaded = [name for name in values if not _UNIMPORTANT.search(name)]
    filled = values.keys() | _unit_statistics(values, state).keys()
    differing = {mismatch.name for mismatch in report.reinitialised}
    report.missing = _important(name for name in state if name not in filled | differing)
    report.unexpected = _important(name for name in weights if name not in used)
    return values, report


def _sources(
    state: Mapping[str, Tensor], weights: Mapping[str, Tensor], by_suffix: bool
) -> Iterator[tuple[str, str]]:
    """For each name of the model, the file's name for it: itself, or its longest known suffix."""
    for name in state:
        parts = name.split(".")
        suffixes = (".".join(parts[start:]) for start in range(len(parts) if by_suffix else 1))
        source = next((suffix for suffix in suffixes if suffix in weights), None)
        if source is not None:
            yield name, source


def _unit_statistics(
    values: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Mean 0 and variance 1 for norms whose statistics were folded into weight and bias.

    Caffe2's ImageNet backbones are such files; Detectron2 reads them in the same way.
    """
    statistics = {}
    for name in values:
        module, _, kind = name.rpartition(".")
        mean, variance = f"{module}.running_mean", f"{module}.running_var"
        if kind == "weight" and mean in state and mean not in values:
            statistics[mean] = torch.zeros_like(state[mean])
            statistics[variance] = torch.ones_like(state[variance])
    return statistics


def _is_pixel_statistic(name: str) -> bool:
    return name.rpartition(".")[2] in ("pixel_mean", "pixel_std")


def _important(names: Iterable[str]) -> list[str]:
    return [name for name in names if not _UNIMPORTANT.search(name)]


def _by_module(names: list[str], known: Iterable[str]) -> list[str]:
    """One line for each outermost module that ``known`` has nothing of."""
    prefixes = {prefix for name in known for prefix in _prefixes(name)}
    groups = Counter(
        next((p for p in _prefixes(name) if p not in prefixes), name) for name in names
    )
    return [
        name if count == 1 and name in names else f"{name} ({count} tensors)"
        for name, count in sorted(groups.items())
    ]


def _prefixes(name: str) -> list[str]:
    """``a.b.c`` -> ``a``, ``a.b``, ``a.b.c``."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
