"""The evaluation of a configuration on its test sets."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode
from numpy.typing import NDArray

from cascade_det import config
from cascade_det.data.coco import CocoDataset, left_out_notes
from cascade_det.data.loader import build_test_loader
from cascade_det.data.transforms import read_image
from cascade_det.engine import distributed
from cascade_det.engine.checkpoint import Checkpointer
from cascade_det.engine.inference import run_inference
from cascade_det.engine.weight_addresses import local_path
from cascade_det.errors import ConfigError, DatasetError
from cascade_det.evaluation import (
    default_evaluators,
    describe_machine,
    format_report,
    write_results,
)
from cascade_det.evaluation.analysis_files import write_analysis
from cascade_det.evaluation.figures import plot_report
from cascade_det.standalone.build import build_detector, set_backends
from cascade_det.standalone.datasets import load_datasets
from cascade_det.standalone.detector import Detector
from cascade_det.standalone.predictor import run_info

logger = logging.getLogger(__name__)


def evaluate(cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
    """Evaluate the weights of a configuration on ``DATASETS.TEST``.

    Args:
        cfg: a checked configuration with ``MODEL.WEIGHTS``.
        resume: take the last checkpoint in ``OUTPUT_DIR`` instead.

    Returns:
        ``bbox``, ``analysis``, ``stages``, ``exits`` and ``latency`` figures; by data set if there
        are several. They are also in ``results.json``, as tables in the log, in ``report.png`` and
        in ``analysis/``. Several processes share the images; all return the same, and the main one
        writes the files.

    Raises:
        ConfigError: if there is no test data set or no weights.
        DatasetError: if data are missing or wrong, or are not of the classes that the checkpoint
            was trained on, where it names them.
        CheckpointError: if weights cannot be read or do not fit, or there is nothing to resume.
    """
    datasets = load_datasets(cfg, train=False)
    if not datasets:
        raise ConfigError("DATASETS.TEST is empty: name a data set to evaluate on")
    set_backends(cfg)
    detector = build_detector(cfg)
    if not cfg.MODEL.WEIGHTS and not resume:
        raise ConfigError("MODEL.WEIGHTS is empty: give the file of weights to evaluate")
    checkpointer = Checkpointer(detector, cfg.OUTPUT_DIR)
    rest = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    run = rest.get("run", {}) if resume else run_info(local_path(cfg.MODEL.WEIGHTS))
    for dataset in datasets:
        _check_trained_classes(run.get("class_names"), dataset)
    return evaluate_all(cfg, detector, datasets, Path(cfg.OUTPUT_DIR))


def evaluate_all(
    cfg: CfgNode, detector: Detector, datasets: Sequence[CocoDataset], output_dir: Path
) -> dict[str, Any]:
    """Evaluate: results of one set as they are; of several, by name, in folders of their own."""
    if len(datasets) == 1:
        return _evaluate_one(cfg, detector, datasets[0], output_dir)
    return {
        dataset.source.name: _evaluate_one(cfg, detector, dataset, output_dir / dataset.source.name)
        for dataset in datasets
    }


def _evaluate_one(
    cfg: CfgNode, detector: Detector, dataset: CocoDataset, output_dir: Path
) -> dict[str, Any]:
    loader = build_test_loader(
        dataset,
        **config.input_arguments(cfg, train=False),
        **config.test_loader_arguments(cfg),
        share=(distributed.rank(), distributed.world_size()),
    )
    evaluators = default_evaluators(
        ground_truth=dataset.ground_truth,
        class_names=dataset.class_names,
        category_ids=dataset.category_ids,
        output_dir=output_dir,
    )
    results = run_inference(detector, loader, evaluators, stages=True)
    results = {**results, "notes": [*results["notes"], *left_out_notes(dataset)]}
    machine = describe_machine(detector.device)
    report = format_report({**results, "machine": machine})
    logger.info("Results on %s:\n\n%s\n", dataset.source.name, report)

    def read(file_name: str) -> NDArray[np.uint8]:
        return read_image(str(dataset.source.image_root / file_name), "BGR")

    def write() -> None:
        write_results(results, output_dir, machine=machine)
        plot_report(results, output_dir / "report.png")
        if results["analysis"]:
            write_analysis(results["analysis"], output_dir, read_image=read)

    distributed.on_main(write)
    return results


def _check_trained_classes(class_names: Sequence[str] | None, dataset: CocoDataset) -> None:
    if class_names is not None and tuple(class_names) != tuple(dataset.class_names):
        raise DatasetError(
            f"{dataset.source.json_file} has the classes {', '.join(dataset.class_names)} (by "
            f"category id), but the checkpoint was trained on {', '.join(class_names)}: evaluate "
            "on the classes that were trained, in the same order"
        )
