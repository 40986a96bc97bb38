"""Calibration of exits, from a target to a folder with YAML files, tables and a plot."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.calibration.assessment import Assessment
from cascade_det.calibration.calibrator import Calibrator
from cascade_det.calibration.gate_costs import GATES_OFF, without_costly_gates
from cascade_det.calibration.image_matching import ImageMatcher
from cascade_det.calibration.provenance import coco_provenance, provenance
from cascade_det.calibration.recording import first_batches, fit_latency, record_dataset
from cascade_det.calibration.report import FILES, write_report
from cascade_det.calibration.risk_control import smallest_sample
from cascade_det.calibration.sample_size import SampleSize, images_to_search
from cascade_det.calibration.search_space import TILE_THRESHOLDS, default_exits
from cascade_det.calibration.target import Options, Target
from cascade_det.data.coco import CocoDataset
from cascade_det.engine.detector import CascadeDetector
from cascade_det.engine.devices import device_name
from cascade_det.engine.inference import BatchLoader
from cascade_det.errors import ConfigError, DatasetError
from cascade_det.evaluation.average_precision import detections_limit
from cascade_det.files import atomic_folder, remove_leftovers

logger = logging.getLogger(__name__)

LOG_FILE = "log.txt"
MADE = (*FILES, LOG_FILE)


def calibrate(
    cfg: CfgNode,
    open_detector: Callable[[], tuple[CascadeDetector, CocoDataset, BatchLoader]],
    target: Target,
    output_dir: Path,
    options: Options,
) -> dict[str, Any]:
    """Find exits for a target, and write them with the metrics to expect.

    Args:
        cfg: of the detector.
        open_detector: gives the detector, the calibration set with its ground truth, and a
            loader of it.
        target: the goal.
        output_dir: for ``exits.yaml``, ``quality.yaml``, ``balanced.yaml``, ``fast.yaml``,
            ``front.csv``, ``front.png``, ``comparison.csv`` and ``calibration.json``. Apart from
            the log it may hold nothing else, and is replaced as a whole when all files are
            complete, so that files of two calibrations never mix. A profile is left out if it
            breaks its promise, or if another file has the same setting.
        options: how thorough.

    Returns:
        The content of ``calibration.json``.

    Raises:
        CascadeDetError: ``output_dir`` holds other files.
        ConfigError: no setting reaches the target.
        DatasetError: the images lack objects.
        SampleTooSmallError: too few images, for a guarantee or at all.
    """
    if target.metric.startswith("sem_seg/"):
        raise ConfigError(
            f"--metric is {target.metric}, which is of segmenters, but the model is a detector: "
            "leave it out, or give bbox/AP or segm/AP"
        )
    target.check_images(options.images)
    remove_leftovers(Path(os.path.realpath(output_dir)).parent)
    with atomic_folder(output_dir, made=MADE) as folder:
        content = _calibrate(cfg, open_detector, target, folder, options)
        keep_log(output_dir / LOG_FILE, folder / LOG_FILE)
    logger.info("Written to %s: exits.yaml and its report", output_dir)
    return content


def keep_log(log: Path, kept: Path) -> None:
    """Link the log, which is still being written, into the new folder."""
    if not log.is_file():
        return
    try:
        os.link(log, kept)
    except OSError:  # a file system without hard links: later lines of the log are not kept
        shutil.copyfile(log, kept)


def _calibrate(
    cfg: CfgNode,
    open_detector: Callable[[], tuple[CascadeDetector, CocoDataset, BatchLoader]],
    target: Target,
    folder: Path,
    options: Options,
) -> dict[str, Any]:
    target.check_masks(cfg.MODEL.MASK_ON)
    detector, dataset, loader = open_detector()
    target.check_masks(detector.cascade.masks is not None)
    num_images = min(options.images, len(dataset.records))
    if num_images < len(dataset.records):
        logger.warning(
            "Only the first %d of %d images are used (--images): the promises hold for images "
            "like these",
            num_images,
            len(dataset.records),
        )
    limit = detections_limit(cfg.TEST.DETECTIONS_PER_IMAGE)
    matcher, sample = _checked_matcher(dataset, num_images, target, limit)
    true_masks = None
    if detector.cascade.masks is not None:
        true_masks = _with_masks(matcher, dataset, num_images, target)
    elif cfg.MODEL.MASK_ON:
        logger.warning("Masks do not count: they are made outside the cascade")
    device = device_name(next(detector.parameters()).device)
    source = provenance(cfg, coco_provenance(dataset, num_images), device)
    logger.info("Recording the full cascade on %d images of %s", num_images, dataset.source.name)
    own = detector.cascade.exits
    thresholds = TILE_THRESHOLDS if config.takes_tiles(cfg) else ()
    recording = record_dataset(detector, loader, num_images, true_masks, tile_thresholds=thresholds)
    calibrator = Calibrator(
        cfg,
        recording,
        matcher,
        learned=None if own is None else own.learned,
        score=options.score,
        seed=options.seed,
        metric=target.metric.removeprefix("bbox/"),
        loss=target.loss,
    )
    calibrator.choose_path(target)
    calibrator.try_path()
    _search_where_images_suffice(calibrator, sample, target, options)
    batches = first_batches(loader, options.timed_batches)
    logger.info("Measuring %d batches with more and fewer regions", len(batches))
    latency = fit_latency(
        detector,
        batches,
        most_proposals=calibrator.trials.recording.most_proposals,
        rounds=options.rounds,
        tile_thresholds=recording.tile_thresholds,
    )
    logger.info("Latency model: %s", latency)
    calibration = calibrator.calibrate(target, latency)
    # A guarantee and a rate are of the exits as they were tested.
    if calibration.plain and target.risk is None and target.exit_rate is None:
        changed = without_costly_gates(
            calibrator,
            {"exits": calibration.plain},
            detector,
            batches,
            latency,
            rounds=options.rounds,
        )
        off = changed["exits"].get(GATES_OFF, ())
        calibration = calibrator.with_gates_off(calibration, off, target)
    logger.info("Measuring the exits, and comparing them with baselines")
    assessment = Assessment(calibrator, calibration, latency, detector, batches, options)
    return write_report(assessment, target, source, folder)


def _search_where_images_suffice(
    calibrator: Calibrator, sample: SampleSize, target: Target, options: Options
) -> None:
    """Search freely if half of the images can judge what it finds; logs how many that takes."""
    drop = target.judged_drop
    deviation = calibrator.sequence.evidence.deviation(default_exits(calibrator.num_stages))
    needed = images_to_search(sample, deviation, drop)
    if target.risk is not None:
        needed = max(needed, 2 * smallest_sample(target.risk, target.delta))
    if sample.images < needed:
        logger.info(
            "%s images would suffice for a free search: these %d choose from one path of %d "
            "settings",
            "No number of" if math.isinf(needed) else f"{needed:.0f}",
            sample.images,
            len(calibrator.plain),
        )
        return
    logger.info(
        "%d images suffice for a free search (%.0f or more do): up to %d settings are tried on "
        "one half of them, and the other half judges the best",
        sample.images,
        needed,
        options.trials,
    )
    calibrator.search_freely(options.trials)


def _checked_matcher(
    dataset: CocoDataset, num_images: int, target: Target, max_detections: int
) -> tuple[ImageMatcher, SampleSize]:
    """The matcher of a data set, and its size, after checking that it has enough images."""
    if not dataset.ground_truth.get("annotations"):
        raise DatasetError(
            f"{dataset.source.json_file} has no annotations: exits are calibrated on images with "
            "ground truth"
        )
    target.check_images(num_images)
    matcher = ImageMatcher(
        dataset.ground_truth, dataset.category_ids, max_detections=max_detections
    )
    ids = [record.image_id for record in dataset.records[:num_images]]
    sample = SampleSize.of(ids, matcher, dataset.class_names)
    sample.log(target)
    return matcher, sample


def _with_masks(
    matcher: ImageMatcher, dataset: CocoDataset, num_images: int, target: Target
) -> ImageMatcher | None:
    """The matcher, if the images have objects with masks.

    Raises:
        DatasetError: they have none, and the target needs them.
    """
    ids = [record.image_id for record in dataset.records[:num_images]]
    if any((~matcher.masks_of(image_id).crowds).any() for image_id in ids):
        return matcher
    text = f"{dataset.source.json_file} has no masks (segmentation)"
    if target.needs_masks:
        raise DatasetError(
            f"{text}, which --metric segm/AP and --loss masks need. Use images with masks."
        )
    logger.warning("%s: AP is of boxes alone", text)
    return None
