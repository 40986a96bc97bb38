"""Contenders in turn on the same input: heads alone, whole models, parts and training steps."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cascade_det.benchmark.agreement import compare_detections
from cascade_det.benchmark.contenders import Contender, Outcome
from cascade_det.benchmark.options import Options
from cascade_det.benchmark.setup import Setup
from cascade_det.benchmark.timing import Spread, alternate, ratio
from cascade_det.engine.allocator import keep_freed_memory

logger = logging.getLogger(__name__)

# Whose detections the others of its weights are held against, if it runs: the first of them.
_REFERENCES = ("detectron2-cascade", "ours")
_OTHER_WEIGHTS = ("detectron2-one-stage", "torchvision")


def is_ours(name: str) -> bool:
    """Whether a contender is ours, in either host, rather than a peer."""
    return name.startswith(("ours", "plugin"))


def compare_heads(
    setup: Setup, contenders: Mapping[str, Contender], images: int, proposals: int
) -> dict[str, Any]:
    """RoI heads alone, on given features and exactly so many regions of each image.

    Returns:
        See ``_compare``.
    """
    batches = setup.batches(images)
    given = [(batch, setup.regions(batch, proposals)) for batch in batches]
    # Contenders that are one model in several settings get the same features.
    prepared: dict[Any, list[Any]] = {}
    runs = {}
    for name, contender in contenders.items():
        key = contender.model, contender.autocast
        if key not in prepared:
            prepared[key] = [contender.prepare(*each) for each in given]
        runs[name] = _on_each(contender.heads, prepared[key])
    return _compare(setup, contenders, runs, images, proposals)


def compare_whole(
    setup: Setup, contenders: Mapping[str, Contender], images: int, proposals: int
) -> dict[str, Any]:
    """Whole models, on images as their loaders give them, with so many regions from the RPN.

    Returns:
        See ``_compare``.
    """
    batches = setup.batches(images)
    runs = {}
    for name, contender in contenders.items():
        contender.limit_proposals(proposals)
        runs[name] = _on_each(contender.whole, [contender.inputs(batch) for batch in batches])
    return _compare(setup, contenders, runs, images, proposals)


def compare_parts(
    setup: Setup, contenders: Mapping[str, Contender], images: int, proposals: int
) -> dict[str, Any]:
    """Parts of whole models: ``contenders``, by name and part spreads of ms per image."""
    batches = setup.batches(images)
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    calls, runs = {}, {}
    for name, contender in contenders.items():
        contender.limit_proposals(proposals)
        run = _on_each(contender.parts, [contender.inputs(batch) for batch in batches])
        runs[name] = run
        calls[name] = lambda number, name=name, run=run: found[name].append(run(number))
    # What these calls take in all is not kept: they wait for the device at every part.
    course = {**_course(setup), "warmup": 0}
    alternate(calls, before=_own_memory(contenders, runs), **course)
    return {
        "batch": images,
        "proposals": proposals,
        "contenders": {name: _spreads(times, images) for name, times in found.items()},
    }


def compare_training(
    setup: Setup, steps: Mapping[str, Callable[[], object]], images: int
) -> dict[str, Any]:
    """Steps of training on one batch; ``contenders`` and ``ratios`` as of ``_compare``."""
    calls = {name: lambda _, step=step: step() for name, step in steps.items()}

    def prepare(name: str, _: int) -> None:
        # Our training on a CPU lets the process keep freed memory, see ``set_backends``.
        keep_freed_memory(is_ours(name))

    times = alternate(calls, before=prepare, **_course(setup))
    return {"batch": images, **_figures(times, images)}


def _compare(
    setup: Setup,
    contenders: Mapping[str, Contender],
    runs: Mapping[str, Callable[[int], Any]],
    images: int,
    proposals: int,
) -> dict[str, Any]:
    """Times, ratios, and what came out.

    Returns:
        ``batch`` and ``proposals`` as given; ``contenders`` by name: ``ms_per_image`` (a spread),
        ``arrived`` and ``entered`` (regions of an image that reached the heads, and that each
        stage computed); ``ratios`` of every peer to every one of ours; ``agreement``, of those
        without exits that have the same weights, with the first of them.
    """
    # Also the first round of warming up.
    outcomes = {name: contenders[name].outcome(runs[name](0)) for name in contenders}
    course = _course(setup)
    course["warmup"] = max(0, course["warmup"] - 1)
    times = alternate(runs, before=_own_memory(contenders, runs), **course)
    figures = _figures(times, images)
    for name, outcome in outcomes.items():
        figures["contenders"][name] |= {
            "arrived": outcome.arrived / images,
            "entered": [count / images for count in outcome.entered],
            "detections": sum(map(len, outcome.detections)) / images,
        }
    return {
        "batch": images,
        "proposals": proposals,
        **figures,
        "agreement": _agreement(contenders, outcomes),
    }


def _own_memory(
    contenders: Mapping[str, Contender], runs: Mapping[str, Callable[[int], Any]]
) -> Callable[[str, int], None]:
    """Lets the process treat freed memory as it would if a contender were alone in it.

    Whoever is next runs once untimed: what the last one left of memory and caches is not its own.
    """

    def prepare(name: str, number: int) -> None:
        keep_freed_memory(contenders[name].keeps_memory)
        runs[name](number)

    return prepare


def _figures(times: Mapping[str, Sequence[float]], images: int) -> dict[str, Any]:
    spreads = {
        name: {"ms_per_image": Spread.of([time / images for time in taken]).as_dict()}
        for name, taken in times.items()
    }
    ratios = [
        {"what": own, "against": peer, "ratio": ratio(times[peer], times[own]).as_dict()}
        for own in times
        for peer in times
        if is_ours(own) and not is_ours(peer)
    ]
    return {"contenders": spreads, "ratios": ratios}


def _agreement(
    contenders: Mapping[str, Contender], outcomes: Mapping[str, Outcome]
) -> dict[str, Any]:
    alike = [
        name
        for name, contender in contenders.items()
        if contender.exits is None and not name.startswith(_OTHER_WEIGHTS)
    ]
    reference = next((name for name in _REFERENCES if name in alike), None)
    if reference is None:
        return {}
    wanted = outcomes[reference].detections
    compared = {
        name: compare_detections(outcomes[name].detections, wanted)
        for name in alike
        if name != reference
    }
    return {"with": reference, "contenders": compared} if compared else {}


def _on_each(call: Callable[[Any], Any], inputs: Sequence[Any]) -> Callable[[int], Any]:
    """The call on one input after the other, by the number of the round."""
    return lambda number: call(inputs[number % len(inputs)])


def _spreads(times: Sequence[Mapping[str, float]], images: int) -> dict[str, Any]:
    parts = list(dict.fromkeys(part for run in times for part in run))
    return {
        part: Spread.of([run.get(part, 0.0) / images for run in times]).as_dict() for part in parts
    }


def _course(setup: Setup) -> dict[str, Any]:
    options: Options = setup.options
    return {
        "rounds": options.rounds,
        "warmup": options.warmup,
        "seconds": options.seconds,
        "device": setup.device,
    }
