"""Evaluates a segmenter on a data set: all metrics, as a report in the log and in files."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from cascade_det import config
from cascade_det.data.samples import Sample
from cascade_det.data.semantic import SemanticDataset, read_labels
from cascade_det.data.semantic.reading import read_pair, visible_pixels
from cascade_det.data.transforms import Pixels
from cascade_det.engine.detector import Segmenter
from cascade_det.engine.devices import describe_dtypes, weight_dtypes
from cascade_det.engine.evaluate import by_dataset
from cascade_det.engine.inference import BatchLoader, run_segmentation
from cascade_det.engine.semantic_datasets import semantic_test_loader
from cascade_det.evaluation import Evaluator, LatencyEvaluator
from cascade_det.evaluation.levels import LevelEvaluator
from cascade_det.evaluation.semantic import Labels, SemanticEvaluator
from cascade_det.evaluation.volume_evaluator import VolumeEvaluator, VolumeSlice
from cascade_det.evaluation.worst_images import WorstImage
from cascade_det.parallel import distributed
from cascade_det.report.analysis_files import as_extra
from cascade_det.report.pages.evaluation import write_evaluation_page
from cascade_det.report.pages.page import REPORT_FILE
from cascade_det.report.plots import plot_report
from cascade_det.report.segmentation_mistakes import draw_segmentation_mistakes
from cascade_det.report.semantic_analysis_files import write_semantic_analysis
from cascade_det.report.text import describe_machine, format_report, write_results

logger = logging.getLogger(__name__)

_WORST_IMAGES = 20


def evaluate_sets(
    cfg: CfgNode,
    segmenter: Segmenter,
    datasets: Sequence[SemanticDataset],
    *,
    levels: bool = True,
) -> dict[str, Any]:
    """Evaluate a segmenter on data sets, with results in ``OUTPUT_DIR``.

    For ``levels`` and what is returned see ``evaluate_segmentation``; by data set if there are
    several.
    """

    def evaluate_one(dataset: SemanticDataset, folder: Path) -> dict[str, Any]:
        loader = semantic_test_loader(cfg, dataset)
        return evaluate_segmentation(
            segmenter, loader, dataset, folder, levels=levels, settings=config.settings(cfg)
        )

    return by_dataset(datasets, Path(cfg.OUTPUT_DIR), evaluate_one)


def evaluate_segmentation(
    segmenter: Segmenter,
    loader: BatchLoader,
    dataset: SemanticDataset,
    output_dir: Path,
    *,
    levels: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate a segmenter; several processes share the images, the main one writes the files.

    Args:
        segmenter: with its weights.
        loader: batches of this process.
        dataset: with the true labels.
        output_dir: for ``results.json``, ``report.html``, ``report.png`` and ``analysis/``.
        levels: whether the segmenter can report what it predicts after each level.
        settings: see :func:`cascade_det.config.settings`; for the report.

    Returns:
        ``sem_seg``, ``sem_seg_analysis``, ``levels`` where it can, ``latency``, and ``volumes`` and
        ``volumes_strict`` of data sets of volumes; the same on every process.
    """
    pixels, others = _evaluators(dataset, levels)
    results = run_segmentation(segmenter, loader, [pixels, *others], levels=levels)
    assert isinstance(segmenter, nn.Module)
    dtype = describe_dtypes(weight_dtypes([("model", segmenter)]))
    machine = describe_machine(next(segmenter.parameters(), torch.empty(0)).device, dtype)
    report = format_report({**results, "machine": machine})
    logger.info("Results on %s:\n\n%s\n", dataset.source.name, report)

    def write() -> None:
        about = {"data": _describe(dataset), "config": settings or {}}
        write_results({**results, **about}, output_dir, machine=machine)
        with as_extra(output_dir / "report.png") as path:
            plot_report(results, path)
        pictures = [partial(_draw, dataset, image) for image in pixels.worst.images]
        write_semantic_analysis(results, output_dir, pictures)
        with as_extra(output_dir / REPORT_FILE):
            write_evaluation_page(output_dir)

    distributed.on_main(write)
    return results


def _describe(dataset: SemanticDataset) -> dict[str, Any]:
    source = dataset.source
    return {
        "name": source.name,
        "format": source.format,
        "folder": str(source.folder),
        "images": len(dataset.records),
        "skipped": sum(dataset.left_out.values()),
    }


def _draw(dataset: SemanticDataset, worst: WorstImage) -> Pixels:
    record = dataset.records[worst.image_id]
    image, truth = read_pair(record, "BGR")
    number = "" if record.slice_index is None else f", slice {record.slice_index}"
    return draw_segmentation_mistakes(
        visible_pixels(image),
        truth,
        worst.prediction,
        dataset.class_names,
        title=f"{Path(record.file_name).name}{number}: mean IoU {worst.mean_iou:.0f} %",
        ignored=dataset.ignore_value,
    )


def _evaluators(
    dataset: SemanticDataset, levels: bool
) -> tuple[SemanticEvaluator, list[Evaluator]]:
    records = dataset.records
    depths = Counter(record.volume for record in records)

    def truth_of(sample: Sample) -> Labels:
        return read_labels(records[sample["image_id"]])

    def slice_of(sample: Sample) -> VolumeSlice:
        record = records[sample["image_id"]]
        assert record.slice_index is not None
        return VolumeSlice(record.volume, record.slice_index, depths[record.volume])

    arguments: dict[str, Any] = {
        "class_names": dataset.class_names,
        "truth_of": truth_of,
        "ignore_label": dataset.ignore_value,
    }
    pixels = SemanticEvaluator(**arguments, num_worst=_WORST_IMAGES)
    found: list[Evaluator] = [LatencyEvaluator()]
    if levels:
        found.append(LevelEvaluator(**arguments))
    if all(record.slice_index is not None for record in records):
        found.append(
            VolumeEvaluator(class_names=dataset.class_names, truth_of=truth_of, slice_of=slice_of)
        )
    return pixels, found
