"""Runs a detector over a loader and feeds its output to evaluators."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, Protocol

import torch
from tqdm import tqdm

from cascade_det.core.structures import DetectorOutput, PartTimer
from cascade_det.data.samples import Batch
from cascade_det.engine.detector import InferenceDetector, Segmenter
from cascade_det.evaluation import Evaluator
from cascade_det.parallel import distributed
from cascade_det.segmentation.output import SegmenterOutput

logger = logging.getLogger(__name__)

# Seconds between two log lines where there is no terminal to draw a bar on.
_LOG_SECONDS = 30.0


class BatchLoader(Sized, Protocol):
    """A finite loader: a known number of batches."""

    def __iter__(self) -> Iterator[Batch]:
        """The batches, in order."""


def run_inference(
    detector: InferenceDetector,
    loader: BatchLoader,
    evaluators: Sequence[Evaluator],
    *,
    stages: bool = False,
) -> dict[str, Any]:
    """Detect on every batch and pass the output to the evaluators.

    ``output.stats.milliseconds`` gets the time of each part. The first batch runs once untimed
    before the loop, so that the times leave out first-call costs.

    Several processes call this together, each with its share of the batches, which may be empty:
    the main process merges the evaluators' states and computes the results.

    Args:
        detector: in any mode.
        loader: the batches of this process.
        evaluators: called in order.
        stages: also report what each stage alone would give.

    Returns:
        The evaluators' results, merged; the same on every process.

    Raises:
        ValueError: two evaluators give results of the same name.
        PeerError: on the other processes, if the main one cannot compute the results.
    """
    device = next(detector.parameters(), torch.empty(0)).device

    def detect(batch: Batch) -> DetectorOutput:
        timer = PartTimer(device)
        output = detector.detect(batch, stages=stages, timer=timer)
        output.stats.milliseconds = dict(timer.milliseconds)
        return output

    return _run(detect, loader, evaluators)


def run_segmentation(
    segmenter: Segmenter,
    loader: BatchLoader,
    evaluators: Sequence[Evaluator],
    *,
    levels: bool = False,
) -> dict[str, Any]:
    """Segment every batch and pass the output to the evaluators, as ``run_inference`` does."""
    device = next(segmenter.parameters(), torch.empty(0)).device

    def segment(batch: Batch) -> SegmenterOutput:
        timer = PartTimer(device)
        output = segmenter.segment(batch, levels=levels, timer=timer)
        output.stats.milliseconds = dict(timer.milliseconds)
        return output

    return _run(segment, loader, evaluators)


def _run(
    infer: Callable[[Batch], Any], loader: BatchLoader, evaluators: Sequence[Evaluator]
) -> dict[str, Any]:
    images, start = 0, time.perf_counter()
    with torch.inference_mode():
        for index, batch in enumerate(_with_progress(loader)):
            if index == 0:
                infer(batch)
            output = infer(batch)
            for evaluator in evaluators:
                evaluator.process(batch, output)
            images += len(batch)
    images = sum(distributed.all_gather(images))
    seconds = time.perf_counter() - start
    if images == 0:
        logger.warning("No images to detect on: the loader is empty.")
    logger.info(
        "Inference on %d images took %.1f s (%.4f s per image)",
        images,
        seconds,
        seconds / max(images, 1),
    )
    return _results_of_all(evaluators)


def _with_progress(loader: BatchLoader) -> Iterator[Batch]:
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
    alone = distributed.world_size() == 1
    states = [None if alone else distributed.gather(e.state()) for e in evaluators]

    def evaluate() -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for evaluator, states_of_all in zip(evaluators, states, strict=True):
            if states_of_all is not None:
                evaluator.merge(states_of_all)
            results = evaluator.evaluate()
            if twice := merged.keys() & results.keys():
                raise ValueError(f"Two evaluators give results named {', '.join(sorted(twice))}.")
            merged.update(results)
        return merged

    return distributed.on_main(evaluate)
