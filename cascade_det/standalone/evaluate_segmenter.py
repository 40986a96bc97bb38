"""Evaluation of a segmenter on the test sets of its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from torch.utils.data import DataLoader

from cascade_det import config
from cascade_det.data.samples import Sample
from cascade_det.data.semantic import SemanticDataset, build_semantic_test_loader
from cascade_det.engine.checkpoint import Checkpointer
from cascade_det.engine.devices import set_backends
from cascade_det.engine.evaluate import by_dataset
from cascade_det.engine.evaluate_semantic import evaluate_segmentation
from cascade_det.engine.run_lock import alone_in_output_dir
from cascade_det.engine.run_weights import load_to_evaluate
from cascade_det.engine.semantic_datasets import load_semantic_datasets_to_evaluate
from cascade_det.parallel import distributed
from cascade_det.standalone.build_segmenter import build_segmenter
from cascade_det.standalone.segmenter import SemanticSegmentor


@alone_in_output_dir
def evaluate_segmenter(cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
    """Evaluate the weights of a segmenter on ``DATASETS.TEST``.

    Args and errors as ``cascade_det.standalone.evaluate.evaluate``.

    Returns:
        See ``cascade_det.engine.evaluate_semantic.evaluate_segmentation``; by data set if there
        are several.
    """
    segmenter, datasets = load_segmenter(cfg, resume=resume)
    return evaluate_sets(cfg, segmenter, datasets)


def load_segmenter(
    cfg: CfgNode, *, resume: bool = False
) -> tuple[SemanticSegmentor, list[SemanticDataset]]:
    """A segmenter with its weights, and the data sets of ``DATASETS.TEST``.

    Args and errors as ``evaluate_segmenter``.
    """
    datasets = load_semantic_datasets_to_evaluate(cfg, resume=resume)
    set_backends(cfg)
    segmenter = build_segmenter(cfg)
    load_to_evaluate(Checkpointer(segmenter, cfg.OUTPUT_DIR), cfg, datasets, resume=resume)
    return segmenter, datasets


def evaluate_sets(
    cfg: CfgNode, segmenter: SemanticSegmentor, datasets: Sequence[SemanticDataset]
) -> dict[str, Any]:
    """Evaluate a segmenter on data sets, with results in ``OUTPUT_DIR``."""

    def evaluate_one(dataset: SemanticDataset, folder: Path) -> dict[str, Any]:
        return evaluate_segmentation(segmenter, test_loader(cfg, dataset), dataset, folder)

    return by_dataset(datasets, Path(cfg.OUTPUT_DIR), evaluate_one)


def test_loader(
    cfg: CfgNode,
    dataset: SemanticDataset,
    *,
    annotated: bool = False,  # noqa: PT028 - not a test
) -> DataLoader[Sample]:
    """Batches of this process's share of a test set, with labels if ``annotated``."""
    return build_semantic_test_loader(
        dataset,
        **config.semantic_input_arguments(cfg, train=False),
        **config.test_loader_arguments(cfg),
        share=(distributed.rank(), distributed.world_size()),
        annotated=annotated,
    )
