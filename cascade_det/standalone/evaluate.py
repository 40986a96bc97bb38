"""The evaluation of a configuration on its test sets."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.data.coco import CocoDataset
from cascade_det.data.loader import build_test_loader
from cascade_det.engine.checkpoint import Checkpointer
from cascade_det.engine.inference import run_inference
from cascade_det.errors import ConfigError
from cascade_det.evaluation import (
    default_evaluators,
    describe_machine,
    format_report,
    write_results,
)
from cascade_det.evaluation.figures import plot_report
from cascade_det.standalone.build import build_detector, set_backends
from cascade_det.standalone.datasets import load_datasets
from cascade_det.standalone.detector import Detector

logger = logging.getLogger(__name__)


def evaluate(cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
    """Evaluate the weights of a configuration on ``DATASETS.TEST``.

    Args:
        cfg: a checked configuration with ``MODEL.WEIGHTS``.
        resume: take the last checkpoint in ``OUTPUT_DIR`` instead, if there is one.

    Returns:
        ``bbox``, ``stages``, ``exits`` and ``latency`` figures; by data set if there are several.
        They are also in ``results.json``, as tables in the log, and in ``report.png``.

    Raises:
        ConfigError: if there is no test data set or no weights.
        DatasetError: if data are missing or wrong.
        CheckpointError: if weights cannot be read or do not fit.
    """
    datasets = load_datasets(cfg, train=False)
    if not datasets:
        raise ConfigError("DATASETS.TEST is empty: name a data set to evaluate on")
    set_backends(cfg)
    detector = build_detector(cfg)
    checkpointer = Checkpointer(detector, cfg.OUTPUT_DIR)
    if not cfg.MODEL.WEIGHTS and not (resume and checkpointer.has_checkpoint()):
        raise ConfigError("MODEL.WEIGHTS is empty: give the file of weights to evaluate")
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
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
    arguments = config.input_arguments(cfg, train=False)
    loader = build_test_loader(
        dataset,
        min_sizes=arguments["min_sizes"],
        max_size=arguments["max_size"],
        image_format=arguments["image_format"],
        **config.test_loader_arguments(cfg),
    )
    evaluators = default_evaluators(
        ground_truth=dataset.ground_truth,
        class_names=dataset.class_names,
        category_ids=dataset.category_ids,
        output_dir=output_dir,
    )
    results = run_inference(detector, loader, evaluators, stages=True)
    machine = describe_machine(detector.device)
    write_results(results, output_dir, machine=machine)
    plot_report(results, output_dir / "report.png")
    report = format_report({**results, "machine": machine})
    logger.info("Results on %s:\n\n%s\n", dataset.source.name, report)
    return results
