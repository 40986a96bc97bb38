"""Training of a segmenter: connects data, segmenter, engine and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.data.semantic import SemanticDataset, build_semantic_train_loader
from cascade_det.engine.checkpoint import Checkpointer
from cascade_det.engine.datasets import scheduled_for
from cascade_det.engine.devices import resolve_amp_dtype, set_backends
from cascade_det.engine.output_dir import check_output, record_start
from cascade_det.engine.run_info import RunInfo
from cascade_det.engine.run_lock import alone_in_output_dir
from cascade_det.engine.run_weights import resume_or_load
from cascade_det.engine.semantic_datasets import load_semantic_training_data
from cascade_det.engine.validation import validation_losses
from cascade_det.parallel import distributed
from cascade_det.standalone.build_segmenter import build_segmenter
from cascade_det.standalone.evaluate_segmenter import evaluate_sets, test_loader
from cascade_det.standalone.segmenter import SemanticSegmentor
from cascade_det.standalone.training import build_trainer


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
    cfg = scheduled_for(cfg, sum(len(dataset.records) for dataset in datasets))
    info = RunInfo.of(cfg, datasets[0], "standalone")
    torch.manual_seed(info.seed)
    segmenter = build_segmenter(cfg)
    checkpointer = Checkpointer(segmenter, cfg.OUTPUT_DIR, save_to_disk=distributed.is_main())
    resume_or_load(checkpointer, cfg, resume=resume)
    checkpointer.add_checkpointable("run", info)
    record_start(cfg, resume=resume)
    if distributed.rank() > 0:
        # Every process drops its own paths.
        torch.manual_seed(info.seed + distributed.rank())
    loader = build_semantic_train_loader(
        datasets,
        **config.semantic_input_arguments(cfg, train=True),
        **{**config.semantic_train_loader_arguments(cfg), "seed": info.seed},
        start_batch=checkpointer.start_iter,
        share=(distributed.rank(), distributed.world_size()),
        on_bad_data=cfg.CASCADE.ON_BAD_DATA,
    )
    evaluation = partial(_evaluation, cfg, test_datasets) if test_datasets else None
    trainer = build_trainer(cfg, segmenter, loader, checkpointer, evaluation)
    trainer.train()
    return dict(trainer.results)


def _evaluation(
    cfg: CfgNode, datasets: Sequence[SemanticDataset], segmenter: SemanticSegmentor
) -> Callable[[], Mapping[str, Any]]:
    arguments = config.trainer_arguments(cfg)
    amp_dtype = resolve_amp_dtype(arguments["amp_dtype"], segmenter.device)

    def evaluate() -> dict[str, Any]:
        # Running statistics of norms differ between processes.
        distributed.synchronise_buffers(segmenter)
        results = evaluate_sets(cfg, segmenter, datasets)
        if not arguments["validation_loss"]:
            return results
        loaders = [test_loader(cfg, dataset, annotated=True) for dataset in datasets]
        batches = (batch for loader in loaders for batch in loader)
        return {**results, "validation": validation_losses(segmenter, batches, amp_dtype=amp_dtype)}

    return evaluate
