"""Evaluation of a segmenter on the test sets of its configuration."""

from __future__ import annotations

from typing import Any

from fvcore.common.config import CfgNode

from cascade_det.data.semantic import SemanticDataset
from cascade_det.engine.checkpoint import Checkpointer
from cascade_det.engine.devices import set_backends
from cascade_det.engine.evaluate_semantic import evaluate_sets
from cascade_det.engine.run_lock import alone_in_output_dir
from cascade_det.engine.run_weights import load_to_evaluate
from cascade_det.engine.semantic_datasets import load_semantic_datasets_to_evaluate
from cascade_det.standalone.build_segmenter import build_segmenter
from cascade_det.standalone.optimize import optimize_segmenter
from cascade_det.standalone.segmenter_base import SegmenterBase


@alone_in_output_dir
def evaluate_segmenter(cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
    """Evaluate the weights of a segmenter on ``DATASETS.TEST``.

    Args and errors as ``cascade_det.standalone.evaluate.evaluate``.

    Returns:
        See ``cascade_det.engine.evaluate_semantic.evaluate_sets``.
    """
    segmenter, datasets = load_segmenter(cfg, resume=resume)
    return evaluate_sets(cfg, segmenter, datasets)


def load_segmenter(
    cfg: CfgNode, *, resume: bool = False
) -> tuple[SegmenterBase, list[SemanticDataset]]:
    """A segmenter with its weights, and the data sets of ``DATASETS.TEST``.

    The segmenter is optimised if ``MODEL.CASCADE.FAST.ENABLED``.

    Args and errors as ``evaluate_segmenter``.
    """
    datasets = load_semantic_datasets_to_evaluate(cfg, resume=resume)
    set_backends(cfg)
    segmenter = build_segmenter(cfg)
    load_to_evaluate(Checkpointer(segmenter, cfg.OUTPUT_DIR), cfg, datasets, resume=resume)
    if cfg.MODEL.CASCADE.FAST.ENABLED:
        optimize_segmenter(segmenter)
    return segmenter, datasets
