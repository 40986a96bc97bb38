"""Evaluates a detector on a data set: all metrics, as a report in the log and in files."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cascade_det.data.coco import CocoDataset, left_out_warnings
from cascade_det.data.semantic import SemanticDataset
from cascade_det.data.transforms import read_image
from cascade_det.engine.detector import Detector
from cascade_det.engine.inference import BatchLoader, run_inference
from cascade_det.evaluation import Evaluator, RegionFlops, default_evaluators
from cascade_det.parallel import distributed
from cascade_det.report.analysis_files import as_extra, write_analysis
from cascade_det.report.pages.evaluation import write_evaluation_page
from cascade_det.report.pages.page import REPORT_FILE
from cascade_det.report.plots import plot_report
from cascade_det.report.text import (
    RESULTS_FILE,
    describe_machine,
    format_report,
    write_results,
)

logger = logging.getLogger(__name__)

AnyDataset = TypeVar("AnyDataset", CocoDataset, SemanticDataset)


def evaluate_dataset(
    detector: Detector,
    loader: BatchLoader,
    dataset: CocoDataset,
    output_dir: Path,
    *,
    detections_per_image: int,
    stages: bool = True,
    fast_ap: bool = False,
    flops: RegionFlops | None = None,
    further: Sequence[Evaluator] = (),
    finish: Callable[[dict[str, Any]], Mapping[str, Any]] = dict,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate a detector; several processes share the images, and the main one writes the files.

    Args:
        detector: with its weights.
        loader: batches of this process.
        dataset: with its ground truth.
        output_dir: for ``results.json``, ``report.html``, ``report.png``, ``analysis/`` and
            ``inference/``.
        detections_per_image: the detector's limit.
        stages: whether the detector can report what each stage alone would give.
        fast_ap: whether ``faster-coco-eval`` scores the stages.
        flops: of one region, see :func:`cascade_det.engine.head_flops.region_flops`.
        further: evaluators besides the default ones.
        finish: called with the results on every process; returns those to report.
        settings: see :func:`cascade_det.config.settings`; for the report.

    Returns:
        ``bbox``, ``analysis``, ``stages``, ``exits``, ``latency``, ``notes`` and the results of
        ``further`` evaluators; the same on every process.
    """
    evaluators = default_evaluators(
        ground_truth=dataset.ground_truth,
        category_ids=dataset.category_ids,
        output_dir=output_dir,
        detections_per_image=detections_per_image,
        stages=stages,
        fast_ap=fast_ap,
        flops=flops,
    )
    found = run_inference(detector, loader, [*evaluators, *further], stages=stages)
    warnings = [*found["notes"], *left_out_warnings(dataset)]
    results = dict(finish({**found, "notes": warnings}))
    machine = describe_machine(next(detector.parameters()).device, detector.dtype)
    report = format_report({**results, "machine": machine})
    logger.info("Results on %s:\n\n%s\n", dataset.source.name, report)

    read = image_reader(dataset.source.image_root)

    def write() -> None:
        about = {"data": describe_data(dataset), "config": settings or {}}
        write_results({**results, **about}, output_dir, machine=machine)
        with as_extra(output_dir / "report.png"):
            plot_report(results, output_dir / "report.png")
        if results["analysis"]:
            write_analysis(results["analysis"], output_dir, read_image=read)
        with as_extra(output_dir / REPORT_FILE):
            write_evaluation_page(output_dir, read_image=read)

    distributed.on_main(write)
    return results


def describe_data(dataset: CocoDataset) -> dict[str, Any]:
    """What ``results.json`` says of its data: enough to read them again."""
    source = dataset.source
    return {
        "name": source.name,
        "json_file": str(source.json_file),
        "image_root": str(source.image_root),
        "images": len(dataset.records),
        "skipped": sum(dataset.left_out.values()),
    }


def image_reader(image_root: Path) -> Callable[[str], NDArray[np.uint8]]:
    """Reads images of a folder by name, as BGR."""

    def read(file_name: str) -> NDArray[np.uint8]:
        return read_image(str(image_root / file_name), "BGR")

    return read


def add_augmented(
    results: Mapping[str, Any],
    datasets: Sequence[CocoDataset],
    output_dir: Path,
    evaluate: Callable[[CocoDataset], Mapping[str, Any]],
) -> dict[str, Any]:
    """Add the metrics of test-time augmentation to those of an evaluation.

    Args:
        results: of ``by_dataset`` with ``evaluate_dataset``.
        datasets: the test sets.
        output_dir: as for ``by_dataset``.
        evaluate: returns the metrics of a data set by task, ``bbox`` and so on, on every process.

    Returns:
        ``results`` with ``bbox_TTA`` and so on beside ``bbox``; also in ``results.json``.
    """

    def evaluate_one(dataset: CocoDataset, folder: Path) -> dict[str, Any]:
        name = dataset.source.name
        metrics = {f"{task}_TTA": value for task, value in evaluate(dataset).items()}
        logger.info(
            "Results on %s with test-time augmentation:\n\n%s\n", name, format_report(metrics)
        )
        if distributed.is_main():
            saved = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
            write_results({**saved, **metrics}, folder)
            with as_extra(folder / REPORT_FILE):
                read = image_reader(dataset.source.image_root)
                write_evaluation_page(folder, read_image=read)
        return {**(results if len(datasets) == 1 else results.get(name, {})), **metrics}

    return {**results, **by_dataset(datasets, output_dir, evaluate_one)}


def by_dataset(
    datasets: Sequence[AnyDataset],
    output_dir: Path,
    evaluate: Callable[[AnyDataset, Path], dict[str, Any]],
) -> dict[str, Any]:
    """Evaluate one data set, or several in folders of their own, with results by name."""
    if len(datasets) == 1:
        return evaluate(datasets[0], output_dir)
    by_name = {dataset.source.name: dataset for dataset in datasets}
    return {name: evaluate(dataset, output_dir / name) for name, dataset in by_name.items()}
