"""Choice of the types of an optimised detector: by its device and backbone, or by images."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

import torch

from cascade_det.core import Detections
from cascade_det.data.samples import Batch
from cascade_det.engine.detector import CascadeDetector
from cascade_det.engine.devices import resolve_fast_dtype
from cascade_det.engine.part_types import PartTypes, candidates, spare_trunk
from cascade_det.errors import ConfigError
from cascade_det.evaluation.agreement import AGAIN_IOU, MIN_SCORE, Agreement, find_again
from cascade_det.layers.int8 import multiplies_int8_exactly
from cascade_det.parallel import distributed

# What a candidate has to keep of the detections in float32. On BCCD, three trainings with
# MobileNetV2 keep 97.5 to 99.0 % in bfloat16, 0.19 pixels away, and AP changes by -0.5 to +0.3.
# With the trunk in float32 they keep 99.8 %, 0.01 to 0.02 pixels away, and it changes by 0.1.
MIN_SHARE = 0.99
MAX_SHIFT = 0.1  # pixels of the original images
# With fewer detections one of them would decide.
MIN_DETECTIONS = 50
_ROUNDS = 3

_D = TypeVar("_D", bound=CascadeDetector)


def resolve_types(
    detector: _D,
    trunk: object,
    make_fast: Callable[[_D, PartTypes], _D],
    *,
    dtype: str,
    float32_parts: Collection[str],
    int8_parts: Collection[str],
    images: Sequence[Batch] | None,
) -> tuple[PartTypes, list[str]]:
    """The types of the parts of a detector to optimise.

    Args:
        detector: in float32; not changed.
        trunk: of its backbone.
        make_fast: see ``choose_types``.
        dtype: see ``resolve_fast_dtype``, or ``int8``: all of ``int8_parts`` in 8 bits, the others
            as ``auto`` has them.
        float32_parts: that stay float32 in any case.
        int8_parts: that can be in 8 bits.
        images: batches to choose by, see ``choose_types``; ``int8`` chooses nothing. Without
            images and with the type ``auto``, trunks whose detections change noticeably in
            bfloat16 stay float32.

    Returns:
        The types, and sentences that say why.

    Raises:
        ConfigError: a type that the device has not, or ``int8`` without images, which measures the
            ranges of maps with them.
        ValueError: an unknown part, or images that cannot decide.
    """
    device = next(detector.parameters()).device
    if images is not None:
        _check_batches(images)
    if dtype == "int8":
        _check_int8(device, images)
    name = "auto" if dtype == "int8" else dtype
    wanted = resolve_fast_dtype(name, device)
    PartTypes.of(wanted, float32_parts)  # checks their names
    if images is None or dtype == "int8":
        spared, reasons = spare_trunk(trunk, name, wanted, float32_parts)
        in_8_bits = set(int8_parts).difference(float32_parts) if dtype == "int8" else ()
        return PartTypes(PartTypes.of(wanted, spared).floating, frozenset(in_8_bits)), reasons
    is_exact = dtype == "auto" and device.type == "cpu" and multiplies_int8_exactly()
    options = candidates(wanted, float32_parts, int8_parts if is_exact else ())
    if len(options) == 1:
        return options[0], ["There are no types to choose by images: all is float32."]
    return choose_types(detector, images, make_fast, options)


def choose_types(
    detector: _D,
    images: Sequence[Batch],
    make_fast: Callable[[_D, PartTypes], _D],
    options: Sequence[PartTypes],
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[PartTypes, list[str]]:
    """Choose the types of parts: of those that detect nearly the same as float32, the fastest.

    Each option detects in all images. It passes if it finds at least ``MIN_SHARE`` of what the
    detector finds in float32 (see ``find_again``) with boxes that move by ``MAX_SHIFT`` pixels at
    most in the mean; the last always passes. Those that pass are timed in turns. Exits are as they
    are, but without a time budget, whose exits depend on the machine.

    Args:
        detector: in float32; not changed.
        images: batches like those that it will be given.
        make_fast: makes an optimised detector of a copy, with these types.
        options: see ``candidates``.
        clock: returns seconds.

    Returns:
        The types, and one sentence for each option.

    Raises:
        ValueError: float32 finds fewer than ``MIN_DETECTIONS`` objects of score ``MIN_SCORE``.
    """
    plain = copy.deepcopy(detector)
    if plain.cascade.exits is not None:
        plain.cascade.exits.time_budget = None
    wanted = detect_all(plain, images)
    count = find_again(wanted, wanted).wanted
    if count < MIN_DETECTIONS:
        raise ValueError(
            f"float32 detects {count} objects with a score of {MIN_SCORE} or more in the "
            f"{len(wanted)} images to choose types by: give images with at least {MIN_DETECTIONS}"
        )
    sentences: list[str] = []
    passing: dict[int, _D] = {}
    for i, types in enumerate(options):
        fast = make_fast(copy.deepcopy(plain), types)
        agreement = find_again(detect_all(fast, images), wanted)
        passes = agreement.share >= MIN_SHARE and agreement.shift <= MAX_SHIFT
        sentences.append(f"{types.describe()}: {describe_agreement(agreement)}")
        if passes or types is options[-1]:
            passing[i] = fast
    milliseconds = _time(passing, images, clock)
    # Clocks of several processes may disagree.
    best = distributed.broadcast(min(milliseconds, key=lambda i: milliseconds[i]))
    return options[best], [
        f"{sentence}, {_verdict(milliseconds.get(i), i == best)}."
        for i, sentence in enumerate(sentences)
    ]


def detect_all(detector: CascadeDetector, images: Sequence[Batch]) -> list[Detections]:
    """The detections in all images, in order."""
    return [found for batch in images for found in detector.detect(batch).detections]


def describe_agreement(agreement: Agreement) -> str:
    """How much of the detections in float32 is found again."""
    return (
        f"finds {100 * agreement.share:.1f} % of {agreement.wanted} detections again at IoU "
        f"{AGAIN_IOU}, {agreement.shift:.2f} pixels away"
    )


def _check_batches(images: Sequence[Batch]) -> None:
    if any(isinstance(batch, Mapping) for batch in images):
        raise ValueError("images are single samples: give batches, lists of samples")


def _check_int8(device: torch.device, images: Sequence[Batch] | None) -> None:
    if device.type != "cpu":
        raise ConfigError(
            "MODEL.CASCADE.FAST.DTYPE is 'int8', which is for CPUs. Give 'auto' on a GPU."
        )
    if not multiplies_int8_exactly():
        raise ConfigError(
            "MODEL.CASCADE.FAST.DTYPE is 'int8', but this CPU clips sums of such products to 16 "
            "bits: it has no VNNI or AMX instructions, or PyTorch does not use them. Give 'auto'."
        )
    if not images:
        raise ConfigError(
            "MODEL.CASCADE.FAST.DTYPE is 'int8', which measures the ranges of maps with some "
            "images. Set MODEL.CASCADE.FAST.IMAGES to a number, such as 32; optimize() takes them "
            "as images."
        )


def _verdict(milliseconds: float | None, is_best: bool) -> str:
    if milliseconds is None:
        return f"refused: {100 * MIN_SHARE:.0f} % within {MAX_SHIFT} pixels are wanted"
    return f"{milliseconds:.1f} ms per image{', chosen' * is_best}"


def _time(
    detectors: Mapping[int, CascadeDetector],
    images: Sequence[Batch],
    clock: Callable[[], float],
) -> dict[int, float]:
    """Milliseconds per image, the least of some rounds in which the detectors take turns."""
    count = sum(map(len, images))
    least = dict.fromkeys(detectors, float("inf"))
    for _ in range(_ROUNDS):
        for i, detector in detectors.items():
            device = next(detector.parameters()).device
            _synchronize(device)
            started = clock()
            detect_all(detector, images)
            _synchronize(device)
            least[i] = min(least[i], 1000 * (clock() - started) / count)
    return least


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
