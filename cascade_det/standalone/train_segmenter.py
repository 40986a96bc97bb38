"""Training of a segmenter: connects data, segmenter, engine and evaluation."""

from __future__ import annotations

from functools import partial
from typing import Any

from fvcore.common.config import CfgNode

from cascade_det.engine.automatic_batch import with_batch_size
from cascade_det.engine.datasets import scheduled_for
from cascade_det.engine.devices import set_backends
from cascade_det.engine.evaluate_semantic import evaluate_sets
from cascade_det.engine.output_dir import check_output
from cascade_det.engine.run_lock import alone_in_output_dir
from cascade_det.engine.semantic_datasets import (
    load_semantic_training_data,
    semantic_test_loader,
    semantic_train_loader,
)
from cascade_det.standalone.build_segmenter import build_segmenter
from cascade_det.standalone.training import build_trainer, build_trial, start_run


@alone_in_output_dir
def train_segmenter(cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
    """Train a segmenter, with checkpoints, metrics and evaluation in ``OUTPUT_DIR``.

    Args and errors as ``cascade_det.standalone.train.train``.

    Returns:
        The results of the last evaluation, see ``evaluate_segmenter``; empty without
        ``DATASETS.TEST``.
    """
    check_output(cfg, resume=resume)
    set_backends(cfg)
    datasets, test_datasets = load_semantic_training_data(cfg)
    trial = partial(
        build_trial,
        build=build_segmenter,
        loader=partial(semantic_train_loader, datasets=datasets, seed=0, start_batch=0),
    )
    cfg = with_batch_size(cfg, trial, resume=resume)
    cfg = scheduled_for(cfg, sum(len(dataset.records) for dataset in datasets))
    segmenter, checkpointer, info = start_run(cfg, build_segmenter, datasets[0], resume=resume)
    loader = semantic_train_loader(
        cfg, datasets, seed=info.seed, start_batch=checkpointer.start_iter
    )
    trainer = build_trainer(
        cfg,
        segmenter,
        loader,
        checkpointer,
        partial(evaluate_sets, cfg, datasets=test_datasets) if test_datasets else None,
        lambda: [semantic_test_loader(cfg, dataset, annotated=True) for dataset in test_datasets],
    )
    trainer.train()
    return dict(trainer.results)
