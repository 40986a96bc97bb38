"""Training of a segmenter in Detectron2, on our data sets and loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import nn

from cascade_det.d2.evaluate import check_expected
from cascade_det.d2.loader import Inputs
from cascade_det.d2.segmenter import Segmenter
from cascade_det.d2.semantic_datasets import find_registered
from cascade_det.d2.train import build_trial, losses_on, run_training
from cascade_det.d2.trainer import Results, Trainer
from cascade_det.data.semantic import SemanticDataset
from cascade_det.engine.automatic_batch import with_batch_size
from cascade_det.engine.datasets import scheduled_for
from cascade_det.engine.devices import on_its_device, set_backends
from cascade_det.engine.evaluate_semantic import evaluate_sets
from cascade_det.engine.output_dir import check_output
from cascade_det.engine.run_info import RunInfo
from cascade_det.engine.run_lock import alone_in_output_dir
from cascade_det.engine.semantic_datasets import (
    load_semantic_training_data,
    semantic_test_loader,
    semantic_train_loader,
)
from cascade_det.parallel import distributed


class SegmenterTrainer(Trainer):
    """A :class:`~cascade_det.d2.trainer.Trainer` that reads data sets of labels.

    A resumed run goes on with the images that the run would have had.

    Args:
        cfg: a checked configuration.
        run: seed, classes and host of this training.
        datasets: to train on.
        evaluate: returns the results of a model; ``None`` for a training without test sets.
    """

    def __init__(
        self,
        cfg: CfgNode,
        run: RunInfo,
        datasets: Sequence[SemanticDataset],
        evaluate: Callable[[nn.Module], Results] | None = None,
    ) -> None:
        self._datasets = datasets
        super().__init__(cfg, run, evaluate)

    def train_batches(self, cfg: CfgNode, start: int) -> Iterable[list[Inputs]]:
        """Endless batches from iteration ``start`` on, those of the standalone host."""
        return semantic_train_loader(cfg, self._datasets, seed=self.run.seed, start_batch=start)


@alone_in_output_dir
def train_segmenter(cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
    """Train a segmenter of Detectron2, with checkpoints, metrics and evaluation in ``OUTPUT_DIR``.

    Args, results and errors as ``cascade_det.standalone.train_segmenter``.
    """
    check_output(cfg, resume=resume)
    set_backends(cfg)
    cfg = on_its_device(cfg)
    datasets, test_datasets = load_semantic_training_data(cfg, find_registered)
    loader = partial(semantic_train_loader, datasets=datasets, seed=0, start_batch=0)
    with EventStorage():
        cfg = with_batch_size(cfg, partial(build_trial, loader=loader), resume=resume)
    cfg = scheduled_for(cfg, sum(len(dataset.records) for dataset in datasets))
    run = RunInfo.of(cfg, datasets[0], "detectron2")
    seed_all_rng(run.seed + distributed.rank())

    def evaluate(model: nn.Module) -> Results:
        segmenter = Segmenter(model)
        results = evaluate_sets(cfg, segmenter, test_datasets, levels=segmenter.has_levels)
        if not cfg.CASCADE.VALIDATION_LOSS:
            return results
        loaders = [semantic_test_loader(cfg, dataset, annotated=True) for dataset in test_datasets]
        return {**results, "validation": losses_on(cfg, segmenter, loaders)}

    trainer = SegmenterTrainer(cfg, run, datasets, evaluate if test_datasets else None)
    results = run_training(trainer, resume=resume)
    check_expected(cfg, results)
    return results
