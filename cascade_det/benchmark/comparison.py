"""Models taking turns on the same input: heads alone, whole models, parts, training steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from cascade_det import config
from cascade_det.benchmark.agreement import compare_detections
from cascade_det.benchmark.models import BenchmarkModel, ModelOutput
from cascade_det.benchmark.options import Options
from cascade_det.benchmark.setup import Setup
from cascade_det.benchmark.timing import alternate, ratio, spread
from cascade_det.core import Detections, MaskRules
from cascade_det.engine.allocator import keep_freed_memory

Models = Mapping[str, BenchmarkModel]
Calls = Mapping[str, Callable[[int], Any]]  # by model; they take the number of the round


class KeepsMemory(Protocol):
    """A model with the setting of the allocator that it runs with."""

    @property
    def keeps_memory(self) -> bool:
        """Whether the process keeps freed memory while it runs."""


class Measured(Protocol):
    """What taking turns needs of a setup."""

    options: Options
    device: torch.device


# Detections are compared with those of the first of these that runs.
_REFERENCES = ("detectron2-cascade", "ours")
# Detections per image whose masks are measured: Detectron2's TEST.DETECTIONS_PER_IMAGE.
MASKS = 100
# Their mask heads are those of other models.
_OTHER_MASKS = ("-exits", "one-stage", "one-stage-autocast")
_OTHER_WEIGHTS = ("detectron2-one-stage", "torchvision")


def is_ours(name: str) -> bool:
    """Whether a model has our heads, in either host; the others are baselines."""
    return name.startswith(("ours", "plugin"))


@torch.no_grad()
def compare_heads(setup: Setup, models: Models, images: int, proposals: int) -> dict[str, Any]:
    """Compare the RoI heads alone, on the same ``proposals`` regions of each image.

    Returns:
        See ``_compare``.
    """
    given = [(batch, setup.regions(batch, proposals)) for batch in setup.batches(images)]
    # One adapter in several settings gets the same features.
    prepared: dict[Any, list[Any]] = {}
    calls = {}
    for name, model in models.items():
        key = model.adapter, model.autocast
        if key not in prepared:
            prepared[key] = [
                model.adapter.prepare(batch, regions, model.autocast) for batch, regions in given
            ]
        calls[name] = call_in_turn(partial(model.run, model.adapter.heads), prepared[key])
    return _compare(setup, models, calls, images, proposals)


def compare_whole(setup: Setup, models: Models, images: int, proposals: int) -> dict[str, Any]:
    """Compare whole models, on images, with at most ``proposals`` regions from the RPN.

    Returns:
        See ``_compare``.
    """
    calls = {}
    for name, model in models.items():
        inputs = _inputs(setup, model, images, proposals)
        calls[name] = call_in_turn(partial(model.run, model.adapter.whole), inputs)
    return _compare(setup, models, calls, images, proposals)


@torch.no_grad()
def compare_masks(setup: Setup, models: Models, images: int) -> dict[str, Any]:
    """Compare the mask heads with their pooling, on the same boxes and classes of each image.

    Returns:
        ``batch``; ``masks`` per image; ``rules``: how many of them per image the configuration's
        rules keep, ``None`` on random detections; ``dtype`` of "ours-fast"; ``contenders`` and
        ``ratios`` as ``_compare``; ``differences``: the largest of probabilities from those of
        the first model, ``with``, by model.
    """
    models = {name: models[name] for name in models if not name.endswith(_OTHER_MASKS)}
    batches = setup.batches(images)
    given = [setup.detections(batch, MASKS) for batch in batches]
    calls = {}
    for name, model in models.items():
        inputs = [
            model.adapter.prepare_masks(*pair, model.autocast)
            for pair in zip(batches, given, strict=True)
        ]
        calls[name] = call_in_turn(partial(model.run, model.adapter.masks), inputs)
    made = {name: torch.cat(call(0)).float() for name, call in calls.items()}
    times = take_turns(setup, models, calls, setup.options.warmup)
    every = [detections for batch in given for detections in batch]
    reference = next((name for name in _REFERENCES if name in made), "")
    return {
        "batch": images,
        "masks": sum(map(len, every)) / len(every),
        "rules": _kept_by_rules(setup, every) if setup.trained else None,
        "dtype": str(setup.fast_dtype).removeprefix("torch."),
        **times_and_ratios(times, images),
        "differences": {
            "with": reference,
            "contenders": {
                name: float((masks - made[reference]).abs().max())
                for name, masks in made.items()
                if reference and name not in (reference, *_OTHER_WEIGHTS)
            },
        },
    }


def compare_parts(setup: Setup, models: Models, images: int, proposals: int) -> dict[str, Any]:
    """Time the parts of whole models.

    Returns:
        ``batch``, ``proposals``, and ``contenders``: the spread of milliseconds per image, by
        model and part.
    """
    calls = {}
    for name, model in models.items():
        calls[name] = call_in_turn(model.parts, _inputs(setup, model, images, proposals))
    spreads = part_spreads(setup, models, calls, images)
    return {"batch": images, "proposals": proposals, "contenders": spreads}


def part_spreads(
    setup: Measured, models: Mapping[str, KeepsMemory], calls: Calls, images: int
) -> dict[str, Any]:
    """Times of parts, in turn: the spread of milliseconds per image, by model and part.

    Args:
        setup: with the number of rounds and the device.
        models: whose calls these are, by name.
        calls: by name; they return milliseconds by part.
        images: in a batch.
    """
    times: dict[str, list[dict[str, float]]] = {name: [] for name in models}

    def time_parts(name: str, number: int) -> None:
        times[name].append(calls[name](number))

    # The total times are not kept: a GPU is synchronised at every part.
    timed = {name: partial(time_parts, name) for name in models}
    alternate(timed, warmup=0, before=_run_untimed(models, calls), **_rounds(setup))
    return {name: _part_spreads(runs, images) for name, runs in times.items()}


def compare_training(
    setup: Setup, steps: Mapping[str, Callable[[], object]], images: int
) -> dict[str, Any]:
    """Compare training steps on one batch.

    Returns:
        ``batch``, and ``contenders`` and ``ratios`` as ``_compare``.
    """

    def step(name: str, _: int) -> None:
        steps[name]()

    def before(name: str, _: int) -> None:
        # Our training on a CPU keeps freed memory, see ``set_backends``.
        keep_freed_memory(is_ours(name))

    calls = {name: partial(step, name) for name in steps}
    times = alternate(calls, warmup=setup.options.warmup, before=before, **_rounds(setup))
    return {"batch": images, **times_and_ratios(times, images)}


def _compare(
    setup: Setup, models: Models, calls: Calls, images: int, proposals: int
) -> dict[str, Any]:
    """Measure times and ratios, and compare the detections.

    Returns:
        ``batch`` and ``proposals`` as given; ``contenders``, by model: ``ms_per_image`` (a
        spread), ``arrived`` and ``entered`` (regions per image that reach the heads, and each
        stage) and ``detections``; ``ratios`` of every baseline to every model of ours;
        ``agreement`` of the models without exits that share weights with the first of them.
    """
    # This is also the first round of the warm-up.
    outputs = {name: models[name].adapter.output(calls[name](0)) for name in models}
    times = take_turns(setup, models, calls, max(0, setup.options.warmup - 1))
    results = times_and_ratios(times, images)
    for name, output in outputs.items():
        results["contenders"][name] |= region_counts(output, images)
    agreement = _agreement(models, outputs)
    return {"batch": images, "proposals": proposals, **results, "agreement": agreement}


def region_counts(output: ModelOutput, images: int) -> dict[str, Any]:
    """Regions per image that ``arrived`` and that ``entered`` each stage, and ``detections``."""
    return {
        "arrived": output.arrived / images,
        "entered": [count / images for count in output.entered],
        "detections": sum(map(len, output.detections)) / images,
    }


def take_turns(
    setup: Measured, models: Mapping[str, KeepsMemory], calls: Calls, warmup: int
) -> dict[str, list[float]]:
    """Milliseconds of calls in turn; before each, the same call runs once untimed.

    So the allocator's settings and caches are those of the model alone.

    Args:
        setup: with the number of rounds and the device.
        models: whose calls these are, by name.
        calls: by name.
        warmup: unmeasured rounds.
    """
    before = _run_untimed(models, calls)
    return alternate(calls, warmup=warmup, before=before, **_rounds(setup))


def _kept_by_rules(setup: Setup, detections: Sequence[Detections]) -> float:
    """Masks per image that the rules of the configuration keep."""
    arguments = config.mask_head_arguments(setup.cfg)
    assert arguments is not None
    rules = MaskRules(**arguments["rules"])
    return sum(int(rules.chosen(found).sum()) for found in detections) / len(detections)


def _inputs(setup: Setup, model: BenchmarkModel, images: int, proposals: int) -> list[Any]:
    model.adapter.limit_proposals(proposals)
    return [model.adapter.inputs(batch) for batch in setup.batches(images)]


def call_in_turn(call: Callable[[Any], Any], inputs: Sequence[Any]) -> Callable[[int], Any]:
    """Calls ``call`` on another input in each round."""
    return lambda number: call(inputs[number % len(inputs)])


def _run_untimed(models: Mapping[str, KeepsMemory], calls: Calls) -> Callable[[str, int], None]:
    def before(name: str, number: int) -> None:
        keep_freed_memory(models[name].keeps_memory)
        calls[name](number)

    return before


def _rounds(setup: Measured) -> dict[str, Any]:
    options = setup.options
    return {"rounds": options.rounds, "seconds": options.seconds, "device": setup.device}


def times_and_ratios(times: Mapping[str, Sequence[float]], images: int) -> dict[str, Any]:
    """Spreads of milliseconds per image, and ratios of every baseline to every model of ours.

    Args:
        times: milliseconds, one per round, by model.
        images: in a batch.
    """
    return {
        "contenders": {
            name: {"ms_per_image": spread([time / images for time in samples])}
            for name, samples in times.items()
        },
        "ratios": [
            {"what": own, "against": baseline, "ratio": ratio(times[baseline], times[own])}
            for own in times
            for baseline in times
            if is_ours(own) and not is_ours(baseline)
        ],
    }


def _agreement(models: Models, outputs: Mapping[str, ModelOutput]) -> dict[str, Any]:
    alike = {
        name: outputs[name].detections
        for name, model in models.items()
        if model.exits is None and not name.startswith(_OTHER_WEIGHTS)
    }
    reference = next((name for name in _REFERENCES if name in alike), "")
    wanted = alike.pop(reference, [])
    if not wanted or not alike:
        return {}
    compared = {name: compare_detections(found, wanted) for name, found in alike.items()}
    return {"with": reference, "contenders": compared}


def _part_spreads(runs: Sequence[Mapping[str, float]], images: int) -> dict[str, Any]:
    parts = dict.fromkeys(part for run in runs for part in run)
    return {part: spread([run.get(part, 0.0) / images for run in runs]) for part in parts}
