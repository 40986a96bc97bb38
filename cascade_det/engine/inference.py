"""A detector over a loader, or over this process's share of it, into evaluators."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, Protocol

import torch
from torch import nn
from tqdm import tqdm

from cascade_det.core.modes import evaluation_mode
from cascade_det.core.structures import DetectorOutput, PartTimer
from cascade_det.engine.precision import amp_dtype_of, autocast
from cascade_det.parallel import distributed

logger = logging.getLogger(__name__)

# Seconds between two log lines where there is no terminal to draw a bar on.
_LOG_SECONDS = 30.0


class Evaluator(Protocol):
    """Takes detections batch by batch and hands out results at the end."""

    def process(self, batch: list[dict[str, Any]], output: DetectorOutput) -> None:
        """Take the output for one batch."""

    def state(self) -> Any:
        """What it took, as something picklable."""

    def merge(self, states: Sequence[Any]) -> None:
        """Put the states of all processes, in the order of ranks, in the place of its own."""

    def evaluate(self) -> Mapping[str, Any]:
        """Results of all batches, by name."""


class BatchLoader(Sized, Protocol):
    """A finite loader: a known number of batches."""

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """The batches, in order."""


def run_inference(
    detector: nn.Module,
    loader: BatchLoader,
    evaluators: Sequence[Evaluator],
    *,
    amp_dtype: torch.dtype | str | None = None,
    warmup: int = 1,
    stages: bool = False,
    timed: bool = True,
) -> dict[str, Any]:
    """Detect on every batch in evaluation mode and give the evaluators what was found.

    The modes of all modules are as before afterwards. An empty loader gives the evaluators
    nothing, and their results. Several processes all call this, each with its share of the
    batches: the main one merges what they saw and computes the results.

    Args:
        detector: has ``detect(batch, stages=, timer=)``.
        loader: the batches of this process, which may be none.
        evaluators: called in order.
        amp_dtype: type of mixed precision; ``None`` for float32.
        warmup: how often the first batch is run in advance, its output thrown away, so that no
            first-call costs are in the times. Only where ``timed``.
        stages: ask for per-stage output too.
        timed: measure milliseconds per part, into ``output.stats.milliseconds``.

    Returns:
        The evaluators' results, merged; the same on every process.

    Raises:
        ValueError: two evaluators give results of the same name.
        PeerError: on the other processes, if the main one cannot compute the results.
    """
    # DistributedDataParallel keeps the detector one level below.
    model: Any = getattr(detector, "module", detector)
    device = _device_of(model)
    images, start = 0, time.perf_counter()
    with evaluation_mode(model), torch.inference_mode():
        for index, batch in enumerate(_with_progress(loader)):
            with autocast(device, amp_dtype_of(amp_dtype)):
                for _ in range(warmup if timed and index == 0 else 0):
                    model.detect(batch, stages=stages, timer=None)
                timer = PartTimer(device) if timed else None
                output = model.detect(batch, stages=stages, timer=timer)
            if timer is not None:
                output.stats.milliseconds = dict(timer.milliseconds)
            for evaluator in evaluators:
                evaluator.process(batch, output)
            images += len(batch)
    images = sum(distributed.all_gather(images))
    seconds = time.perf_counter() - start
    if images == 0:
        logger.warning("No images to detect on: the loader is empty.")
    logger.info(
        "Inference on %d images took %.1f s (%.4f s per image)",
        *(images, seconds, seconds / max(images, 1)),
    )
    return _results_of_all(evaluators)


def _device_of(detector: nn.Module) -> torch.device:
    parameter = next(detector.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _with_progress(loader: BatchLoader) -> Iterator[list[dict[str, Any]]]:
    if sys.stderr.isatty() and distributed.is_main():
        yield from tqdm(loader, desc="inference", unit="batch", leave=False)
        return
    start = logged = time.perf_counter()
    for done, batch in enumerate(loader):
        now = time.perf_counter()
        if done and now - logged >= _LOG_SECONDS:
            logged = now
            left = (now - start) / done * (len(loader) - done)
            logger.info("Inference: %d of %d batches, %.0f s left", done, len(loader), left)
        yield batch


def _results_of_all(evaluators: Sequence[Evaluator]) -> dict[str, Any]:
    if distributed.world_size() == 1:
        return _merged_results(evaluators)
    states = [distributed.gather(evaluator.state()) for evaluator in evaluators]

    def evaluate() -> dict[str, Any]:
        for evaluator, states_of_all in zip(evaluators, states, strict=True):
            evaluator.merge(states_of_all or [])
        return _merged_results(evaluators)

    return distributed.on_main(evaluate)


def _merged_results(evaluators: Sequence[Evaluator]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for evaluator in evaluators:
        results = evaluator.evaluate()
        if twice := merged.keys() & results.keys():
            raise ValueError(f"Two evaluators give results named {', '.join(sorted(twice))}.")
        merged.update(results)
    return merged
