"""Which parts of an optimised detector stay float32: by its backbone, or by given images."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

import torch

from cascade_det.backbones import EfficientViT, MobileNetV2, MobileNetV3Large
from cascade_det.config.cascade_keys import FAST_PARTS as PARTS
from cascade_det.core import Detections
from cascade_det.data.samples import Batch
from cascade_det.engine.detector import CascadeDetector
from cascade_det.evaluation.agreement import AGAIN_IOU, MIN_SCORE, find_again

# Parts that stay float32, from what is usually fastest to what is safest.
CANDIDATES = ((), ("stem", "backbone"), ("stem", "backbone", "fpn"), PARTS)
# What a candidate has to keep of the detections in float32. On BCCD, three trainings with
# MobileNetV2 keep 97.5 to 99.0 % in bfloat16, 0.19 pixels away, and AP changes by -0.5 to +0.3.
# With the trunk in float32 they keep 99.8 %, 0.01 to 0.02 pixels away, and it changes by 0.1.
MIN_SHARE = 0.99
MAX_SHIFT = 0.1  # pixels of the original images
# With fewer detections one of them would decide.
MIN_DETECTIONS = 50
_ROUNDS = 3

# Their depthwise convolutions and narrow maps without a ReLU keep rounding errors.
_CHANGE_IN_BFLOAT16 = (EfficientViT, MobileNetV2, MobileNetV3Large)

_D = TypeVar("_D", bound=CascadeDetector)


def changes_in_bfloat16(trunk: object) -> bool:
    """Whether a trunk is of a family whose detections change noticeably in bfloat16."""
    return isinstance(trunk, _CHANGE_IN_BFLOAT16)


def choose_float32_parts(
    detector: _D,
    images: Sequence[Batch],
    make_fast: Callable[[_D, Collection[str]], _D],
    *,
    float32_parts: Collection[str] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[tuple[str, ...], list[str]]:
    """Choose the parts that stay float32: of those that detect nearly the same, the fastest.

    Each candidate detects in all images. It passes if it finds at least ``MIN_SHARE`` of what the
    detector finds in float32 (see ``find_again``) with boxes that move by ``MAX_SHIFT`` pixels at
    most in the mean; float32 always passes. Those that pass are timed in turns. Exits are as they
    are, but without a time budget, whose exits depend on the machine.

    Args:
        detector: in float32; not changed.
        images: batches like those that it will be given.
        make_fast: makes an optimised detector of a copy, with these parts in float32.
        float32_parts: that stay float32 in any case.
        clock: returns seconds.

    Returns:
        The parts that stay float32, and one sentence for each candidate.

    Raises:
        ValueError: ``images`` are no batches, or float32 finds fewer than ``MIN_DETECTIONS``
            objects of score ``MIN_SCORE`` in them.
    """
    if any(isinstance(batch, Mapping) for batch in images):
        raise ValueError("images are single samples: give batches, lists of samples")
    plain = copy.deepcopy(detector)
    if plain.cascade.exits is not None:
        plain.cascade.exits.time_budget = None
    wanted = _detect(plain, images)
    count = find_again(wanted, wanted).wanted
    if count < MIN_DETECTIONS:
        raise ValueError(
            f"float32 detects {count} objects with a score of {MIN_SCORE} or more in the "
            f"{len(wanted)} images to choose types by: give images with at least {MIN_DETECTIONS}"
        )
    sentences: dict[tuple[str, ...], str] = {}
    passing: dict[tuple[str, ...], _D] = {}
    for candidate in CANDIDATES:
        parts = tuple(part for part in PARTS if part in {*candidate, *float32_parts})
        if parts in sentences:
            continue
        fast = make_fast(copy.deepcopy(plain), parts)
        agreement = find_again(_detect(fast, images), wanted)
        passes = agreement.share >= MIN_SHARE and agreement.shift <= MAX_SHIFT
        sentences[parts] = (
            f"{_name(parts)}: finds {100 * agreement.share:.1f} % of {agreement.wanted} detections "
            f"again at IoU {AGAIN_IOU}, {agreement.shift:.2f} pixels away"
        )
        if passes or len(parts) == len(PARTS):
            passing[parts] = fast
    milliseconds = _time(passing, images, clock)
    best = min(milliseconds, key=lambda parts: milliseconds[parts])
    return best, [
        f"{sentence}, {_verdict(milliseconds.get(parts), parts == best)}."
        for parts, sentence in sentences.items()
    ]


def _name(parts: Collection[str]) -> str:
    if not parts:
        return "No part in float32"
    return "All in float32" if len(parts) == len(PARTS) else f"In float32 {', '.join(parts)}"


def _verdict(milliseconds: float | None, is_best: bool) -> str:
    if milliseconds is None:
        return f"refused: {100 * MIN_SHARE:.0f} % within {MAX_SHIFT} pixels are wanted"
    return f"{milliseconds:.1f} ms per image{', chosen' * is_best}"


def _detect(detector: CascadeDetector, images: Sequence[Batch]) -> list[Detections]:
    return [found for batch in images for found in detector.detect(batch).detections]


def _time(
    detectors: Mapping[tuple[str, ...], CascadeDetector],
    images: Sequence[Batch],
    clock: Callable[[], float],
) -> dict[tuple[str, ...], float]:
    """Milliseconds per image, the least of some rounds in which the detectors take turns."""
    count = sum(map(len, images))
    least = dict.fromkeys(detectors, float("inf"))
    for _ in range(_ROUNDS):
        for parts, detector in detectors.items():
            device = next(detector.parameters()).device
            _synchronize(device)
            started = clock()
            _detect(detector, images)
            _synchronize(device)
            least[parts] = min(least[parts], 1000 * (clock() - started) / count)
    return least


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
