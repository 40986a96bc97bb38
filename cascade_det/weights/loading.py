"""Loads the weights of a file into a model, with a report of what went where."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from cascade_det.errors import CheckpointError
from cascade_det.text import listed
from cascade_det.weights.attention import differs_in_window, resize_biases
from cascade_det.weights.completeness import check_complete, check_finite
from cascade_det.weights.files import WeightsFile, read_weights_file
from cascade_det.weights.load_report import LoadReport
from cascade_det.weights.names import unused_part

logger = logging.getLogger(__name__)

# The encoders of a segmenter with two scales; the file of one encoder fills both.
_ENCODER = re.compile(r"^backbone[12]\.")
# A file may lack these: the configuration sets the pixel statistics, anchors are computed, and
# the count of batches only matters to a BatchNorm without momentum.
_UNIMPORTANT = re.compile(
    r"(^|\.)num_batches_tracked$|(^|\.)pixel_(mean|std)$|anchor_generator\.cell_anchors"
)
# Last parts of names that are never read: the configuration sets pixel statistics, and which bias
# of attention belongs to which two tokens follows from the window.
_NEVER_READ = ("pixel_mean", "pixel_std", "attention_bias_idxs")


def load_weights(model: nn.Module, path: str | Path, *, complete: bool = False) -> LoadReport:
    """Set the parameters and buffers of ``model`` that ``path`` has values for.

    Names are matched exactly. A file that lacks prefixes (a backbone alone, Caffe2's or
    the official names of a classifier) is matched by the longest suffix, as Detectron2 does.
    Tensors of another shape are left as they are, except that tables of attention biases are
    resized to the model's window.

    Args:
        model: its state dict has Detectron2's names.
        path: a file or an address, see :func:`cascade_det.weights.local_path`.
        complete: raise if the file lacks a part of the model or has it in another shape, also one
            that could be resized: for a model that will not be trained.

    Returns:
        The report, which has also been logged.

    Raises:
        CheckpointError: the file cannot be found, fetched or read, nothing in it fits the model,
            it holds NaN or Inf, or it is not complete.
    """
    file = read_weights_file(path)
    state = model.state_dict()
    values, report = _match(file, state)
    if not values:
        # The message needs them only where shapes differ.
        differing = report.reinitialised
        in_file = [f"{name} {shapes[0]}" for name, shapes in differing.items()] or file.weights
        in_model = [f"{name} {shapes[1]}" for name, shapes in differing.items()] or state
        has, wants = listed(sorted(in_file), 3), listed(sorted(in_model), 3)
        raise CheckpointError(
            f"{path}: nothing in it fits this model. The file has {has}; the model wants {wants}. "
            "Check that the file belongs to this architecture."
        )
    statistics = _unit_statistics(values, state)
    # A number that fits the file's type may overflow the model's.
    check_finite(path, {name: value.to(state[name].dtype) for name, value in values.items()})
    if complete:
        missing = [*report.missing, *statistics]
        differing = {**report.reinitialised, **report.resized}
        check_complete(path, report.loaded, missing, differing, report.unexpected)
    model.load_state_dict({**statistics, **values}, strict=False)
    logger.info("%s", report)
    return report


def _match(file: WeightsFile, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], LoadReport]:
    weights = {k: v for k, v in file.weights.items() if k.rpartition(".")[2] not in _NEVER_READ}
    by_suffix = file.matches_by_suffix or not (weights.keys() & state.keys())
    report = LoadReport(file, total=len(_important(state)))
    sources = dict(_sources(state, weights, by_suffix))

    fitting, used = defaultdict(list), set(sources.values())
    for name, source in sources.items():
        in_file, in_model = tuple(weights[source].shape), tuple(state[name].shape)
        if in_file == in_model or differs_in_window(name, in_file, in_model):
            fitting[source].append(name)
        else:
            report.reinitialised[name] = in_file, in_model

    values = {}
    for source, names in fitting.items():
        if len({_ENCODER.sub("", name) for name in names}) > 1:
            report.ambiguous.append(source)
            continue
        for name in names:
            value = weights[source]
            if value.shape != (wanted := state[name].shape):
                report.resized[name] = tuple(value.shape), tuple(wanted)
                value = resize_biases(value, wanted[1])
            values[name] = value
    report.loaded = _important(values)
    filled = values.keys() | _unit_statistics(values, state).keys()
    filled |= report.reinitialised.keys()
    report.missing = _important(name for name in state if name not in filled)
    for name in _important(name for name in weights if name not in used):
        part = unused_part(name, file.origin)
        (report.unused.setdefault(part, []) if part else report.unexpected).append(name)
    return values, report


def _sources(
    state: Mapping[str, Tensor], weights: Mapping[str, Tensor], by_suffix: bool
) -> Iterator[tuple[str, str]]:
    """For each name of the model, the file's name for it: itself, or its longest known suffix."""
    for name in state:
        parts = name.split(".")
        # Shorter suffixes are of other layers where the file's encoder is not quite the model's.
        most = 2 if _ENCODER.match(name) else len(parts)
        suffixes = (".".join(parts[start:]) for start in range(most if by_suffix else 1))
        source = next((suffix for suffix in suffixes if suffix in weights), None)
        if source is not None:
            yield name, source


def _unit_statistics(
    values: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Mean 0 and variance 1 for norms whose statistics were folded into weight and bias.

    Caffe2's ImageNet backbones are such files; Detectron2 does the same.
    """
    statistics = {}
    for name in values:
        module, _, kind = name.rpartition(".")
        mean, variance = f"{module}.running_mean", f"{module}.running_var"
        if kind == "weight" and mean in state and mean not in values:
            statistics[mean] = torch.zeros_like(state[mean])
            statistics[variance] = torch.ones_like(state[variance])
    return statistics


def _important(names: Iterable[str]) -> list[str]:
    return [name for name in names if not _UNIMPORTANT.search(name)]
