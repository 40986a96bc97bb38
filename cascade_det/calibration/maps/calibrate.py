"""Calibration of a segmenter's exits, from a target to a folder with YAML, tables and a plot."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import nn

from cascade_det.calibration.calibrate import LOG_FILE, keep_log
from cascade_det.calibration.maps.choice import choose
from cascade_det.calibration.maps.record import MapRecord, record_images
from cascade_det.calibration.maps.report import MAP_FILES, write_map_report
from cascade_det.calibration.maps.runs import run_decoders
from cascade_det.calibration.maps.scores import Scorer
from cascade_det.calibration.maps.search import Setting, try_settings, worth_running
from cascade_det.calibration.progress import progress_bar
from cascade_det.calibration.provenance import provenance
from cascade_det.calibration.target import Options, Target
from cascade_det.config import map_exit_arguments
from cascade_det.core.modes import evaluation_mode
from cascade_det.core.structures import PartTimer
from cascade_det.data.samples import Batch
from cascade_det.data.semantic import SemanticDataset, read_labels
from cascade_det.engine.detector import CascadeSegmenter
from cascade_det.engine.devices import device_name
from cascade_det.engine.inference import BatchLoader
from cascade_det.errors import ConfigError
from cascade_det.files import atomic_folder, remove_leftovers
from cascade_det.segmentation.logits import predict

logger = logging.getLogger(__name__)

MADE = (*MAP_FILES, LOG_FILE)


def calibrate_maps(
    cfg: CfgNode,
    open_segmenter: Callable[[], tuple[CascadeSegmenter, SemanticDataset, BatchLoader]],
    target: Target,
    output_dir: Path,
    options: Options,
) -> dict[str, Any]:
    """Find exits of a segmenter for a target, and write them with the metrics to expect.

    One half of the images chooses: settings are tried on a record of the whole decoder, and the
    best of each kind really run. The other half reports, and tests the guarantee of ``risk``.

    Args:
        cfg: of the segmenter; its ``PATCH`` and ``CHANNEL_GATES`` stay.
        open_segmenter: gives the segmenter, the calibration set, and a loader of it.
        target: the goal; ``risk`` bounds the mean share of an image's pixels that the whole decoder
            has right and the exits wrong.
        output_dir: for ``MAP_FILES``; see ``calibrate``.
        options: ``images``, ``trials`` and ``seed`` count.

    Returns:
        The content of ``calibration.json``.

    Raises:
        CascadeDetError: ``output_dir`` holds other files.
        ConfigError: no setting reaches the target, or its metric is not of segmenters.
        SampleTooSmallError: too few images, for a guarantee or at all.
    """
    if not target.metric.startswith("sem_seg/"):
        raise ConfigError(
            f"--metric is {target.metric}, but the model is a segmenter: leave it out"
        )
    if target.loss == "masks":
        raise ConfigError("--loss masks is for detectors, not for segmenters: leave it out")
    if cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES < 2:
        raise ConfigError(
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES is 1: a single class is always certain, so nothing can "
            "be calibrated. Count the background as a class."
        )
    target.check_images(options.images, halves=True)
    remove_leftovers(Path(os.path.realpath(output_dir)).parent)
    with atomic_folder(output_dir, made=MADE) as folder:
        content = _calibrate(cfg, open_segmenter, target, folder, options)
        keep_log(output_dir / LOG_FILE, folder / LOG_FILE)
    logger.info("Written to %s: exits.yaml and its report", output_dir)
    return content


def _calibrate(
    cfg: CfgNode,
    open_segmenter: Callable[[], tuple[CascadeSegmenter, SemanticDataset, BatchLoader]],
    target: Target,
    folder: Path,
    options: Options,
) -> dict[str, Any]:
    segmenter, dataset, loader = open_segmenter()
    assert isinstance(segmenter, nn.Module)
    batches = _first_batches(loader, options.images)
    ids = [sample["image_id"] for batch in batches for sample in batch]
    if len(ids) < len(dataset.records):
        logger.warning(
            "Only the first %d of %d images are used (--images): the promises hold for images "
            "like these",
            len(ids),
            len(dataset.records),
        )
    first, second = _halves(dataset, ids, target, options.seed)
    exits = map_exit_arguments(cfg)
    arguments: dict[str, Any] = {
        "num_classes": len(dataset.class_names),
        "ignore_label": dataset.ignore_value,
    }
    metric = target.metric.removeprefix("sem_seg/")
    with evaluation_mode(segmenter):
        records, milliseconds = _record(segmenter, dataset, batches, set(first), exits["patch"])
        with progress_bar("Trying settings", options.trials) as step:
            trials = try_settings(
                [records[image_id] for image_id in first],
                _scorer(dataset, first, metric),
                milliseconds,
                most_trials=options.trials,
                seed=options.seed,
                on_trial=step,
                **arguments,
            )
        settings = {name_of(setting): setting for setting in worth_running(trials)}
        logger.info("Running %d settings on all images, beside simpler decoders", len(settings))
        with progress_bar("Running images", len(ids)) as step:
            runs = run_decoders(
                segmenter,
                batches,
                partial(_truth, dataset),
                settings,
                patch=exits["patch"],
                channel_gates=exits["channel_gates"],
                on_image=step,
                **arguments,
            )
    place = {image_id: index for index, image_id in enumerate(ids)}
    halves = [[place[image_id] for image_id in half] for half in (first, second)]
    choice = choose(
        runs,
        settings,
        halves,
        [_scorer(dataset, half, metric) for half in (first, second)],
        target,
    )
    device = next(segmenter.parameters()).device
    data = {
        "name": dataset.source.name,
        "folder": str(dataset.source.folder),
        "images": len(ids),
    }
    source = provenance(cfg, data, device_name(device))
    return write_map_report(cfg, choice, trials, target, source, device, folder)


def _first_batches(loader: BatchLoader, most: int) -> list[Batch]:
    batches: list[Batch] = []
    for batch in loader:
        batches.append(batch[:most])
        most -= len(batch)
        if most <= 0:
            break
    return batches


def _halves(
    dataset: SemanticDataset, ids: Sequence[int], target: Target, seed: int
) -> tuple[list[int], list[int]]:
    """The images of each half; those of a volume stay together.

    Raises:
        SampleTooSmallError: too few images, or volumes.
    """
    groups: dict[Any, list[int]] = {}
    for image_id in ids:
        groups.setdefault(dataset.records[image_id].volume or image_id, []).append(image_id)
    are_volumes = len(groups) < len(ids)
    target.check_images(len(groups), "volumes" if are_volumes else "images", halves=True)
    order = np.random.default_rng(seed).permutation(len(groups))
    shuffled = [list(groups.values())[index] for index in order]
    first, second = (list(chain.from_iterable(shuffled[start::2])) for start in (0, 1))
    return first, second


def _scorer(dataset: SemanticDataset, ids: Sequence[int], metric: str) -> Scorer:
    groups = [dataset.records[image_id].volume or image_id for image_id in ids]
    numbers = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    return Scorer([numbers[group] for group in groups], metric)


def _truth(dataset: SemanticDataset, sample: Any) -> Any:
    return read_labels(dataset.records[sample["image_id"]])


def _record(
    segmenter: CascadeSegmenter,
    dataset: SemanticDataset,
    batches: Sequence[Batch],
    wanted: set[int],
    patch: int,
) -> tuple[dict[int, MapRecord], list[float]]:
    """Records of some images by id, and the milliseconds of each level of the whole decoder."""
    records: dict[int, MapRecord] = {}
    timer = PartTimer(next(segmenter.parameters()).device)
    with torch.inference_mode(), progress_bar("Recording images", len(wanted)) as step:
        for batch in batches:
            own = [sample for sample in batch if sample["image_id"] in wanted]
            if not own:
                continue
            encoded = segmenter.encode(own)
            logits = segmenter.sem_seg_head.decode(encoded.maps, timer)
            labels = []
            for level in range(len(logits)):
                scores = predict(logits[: level + 1], encoded.size)
                resized = segmenter.at_original_size(scores, encoded, own)
                labels.append([x.argmax(0) for x in resized])
            truths = [_truth(dataset, sample) for sample in own]
            found = record_images(logits, labels, truths, encoded, patch)
            records.update(zip((sample["image_id"] for sample in own), found, strict=True))
            step(len(own))
    return records, list(timer.milliseconds.values())


def name_of(setting: Setting) -> str:
    """A setting in a few words, such as ``patch max 0.99 0.995``."""
    thresholds = " ".join(f"{value:.6g}" for value in setting["thresholds"])
    return f"{setting['kind']} {setting['confidence']} {thresholds}"
