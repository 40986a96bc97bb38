"""Evaluation of a segmenter of Detectron2 on the test sets of its configuration."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from cascade_det.d2.checkpoint import Checkpointer
from cascade_det.d2.evaluate import check_expected
from cascade_det.d2.segmenter import Segmenter
from cascade_det.d2.semantic_datasets import find_registered
from cascade_det.data.semantic import SemanticDataset
from cascade_det.engine.devices import on_its_device, set_backends
from cascade_det.engine.evaluate_semantic import evaluate_sets
from cascade_det.engine.run_lock import alone_in_output_dir
from cascade_det.engine.run_weights import load_to_evaluate
from cascade_det.engine.semantic_datasets import load_semantic_datasets_to_evaluate


@alone_in_output_dir
def evaluate_segmenter(cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
    """Evaluate the weights of a segmenter on ``DATASETS.TEST``.

    Args, results and errors as ``cascade_det.standalone.evaluate_segmenter``.
    """
    segmenter, datasets = load_segmenter(cfg, resume=resume)
    results = evaluate_sets(cfg, segmenter, datasets, levels=segmenter.has_levels)
    check_expected(cfg, results)
    return results


def load_segmenter(
    cfg: CfgNode, *, resume: bool = False
) -> tuple[Segmenter, list[SemanticDataset]]:
    """A segmenter with its weights, and the data sets of ``DATASETS.TEST``.

    Args and errors as ``evaluate_segmenter``.
    """
    datasets = load_semantic_datasets_to_evaluate(cfg, find_registered, resume=resume)
    set_backends(cfg)
    model = build_model(on_its_device(cfg))
    load_to_evaluate(Checkpointer(model, cfg.OUTPUT_DIR), cfg, datasets, resume=resume)
    return Segmenter(model), datasets
