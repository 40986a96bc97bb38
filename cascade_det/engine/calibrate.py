"""The work of ``tools/calibrate_exits.py``: from a target to YAML, table and plot."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from cascade_det.data.coco import CocoDataset
from cascade_det.engine.calibration import Calibrator, split_images
from cascade_det.engine.calibration_report import CalibrationReport
from cascade_det.engine.calibration_target import Options, Target
from cascade_det.engine.inference import BatchLoader
from cascade_det.engine.recording import first_batches, fit_latency, record_dataset
from cascade_det.errors import DatasetError
from cascade_det.evaluation.average_precision import detections_limit
from cascade_det.evaluation.image_matching import ImageMatcher

logger = logging.getLogger(__name__)


def calibrate(
    cfg: CfgNode,
    open_detector: Callable[[], tuple[Any, CocoDataset, BatchLoader]],
    target: Target,
    output_dir: Path,
    options: Options,
) -> dict[str, Any]:
    """Find exits for a target, and write them with what is to be expected of them.

    Args:
        cfg: of the detector.
        open_detector: gives the detector (see ``cascade_det.engine.recording.Detector``), the
            calibration set with its ground truth, and a loader of it.
        target: what is wanted.
        output_dir: of ``exits.yaml``, ``quality.yaml``, ``balanced.yaml``, ``fast.yaml``,
            ``front.csv``, ``front.png``, ``comparison.csv`` and ``calibration.json``.
        options: how thorough.

    Returns:
        The content of ``calibration.json``.

    Raises:
        ConfigError: no setting reaches the target.
        DatasetError: the images lack objects.
        SampleTooSmallError: too few images, for a guarantee or at all.
    """
    target.check_images(options.images)
    detector, dataset, loader = open_detector()
    num_images = min(options.images, len(dataset.records))
    if num_images < len(dataset.records):
        logger.warning(
            "Only the first %d of %d images are used (--images): what is promised is for images "
            "like these",
            *(num_images, len(dataset.records)),
        )
    limit = detections_limit(cfg.TEST.DETECTIONS_PER_IMAGE)
    matcher = _checked_matcher(dataset, num_images, target, options.seed, limit)
    logger.info("Recording the full cascade on %d images of %s", num_images, dataset.source.name)
    own = detector.cascade.exits
    # The recording itself is let go: two halves are kept, which are as large as the whole.
    calibrator = Calibrator(
        cfg,
        record_dataset(detector, loader, num_images),
        matcher,
        learned=None if own is None else own.learned,
        score=options.score,
        seed=options.seed,
    )
    logger.info("Trying up to %d settings on half of them", options.trials)
    calibrator.try_settings(options.trials)
    batches = first_batches(loader, options.timed_batches)
    logger.info("Measuring %d batches", len(batches))
    latency = fit_latency(
        detector,
        batches,
        most_proposals=calibrator.trials.recording.most_proposals,
        rounds=options.rounds,
    )
    logger.info("Latency model: %s", latency)
    calibration = calibrator.calibrate(target, latency)
    report = CalibrationReport(calibrator, detector, batches, options)
    return report.write(calibration, target, latency, output_dir)


def _checked_matcher(
    dataset: CocoDataset, num_images: int, target: Target, seed: int, max_detections: int
) -> ImageMatcher:
    """The objects of a data set, which have to be enough before any long work begins."""
    if not dataset.ground_truth.get("annotations"):
        raise DatasetError(
            f"{dataset.source.json_file} has no annotations: exits are calibrated on images with "
            "ground truth"
        )
    target.check_images(num_images)
    matcher = ImageMatcher(
        *(dataset.ground_truth, dataset.category_ids), max_detections=max_detections
    )
    split_images([record.image_id for record in dataset.records[:num_images]], matcher, seed)
    return matcher
