"""Detectron2's ``DefaultTrainer`` with the engine's step, checkpoints, evaluation and averages."""

from __future__ import annotations

import logging
import random
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, hooks
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage, EventWriter
from fvcore.nn.precise_bn import get_bn_modules
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from cascade_det import config
from cascade_det.d2.checkpoint import Checkpointer
from cascade_det.d2.evaluate import coco_evaluator
from cascade_det.d2.hooks import LearningRate, StorageHistory, as_detectron2_hook, build_writers
from cascade_det.d2.loader import Batches, build_train_loader
from cascade_det.d2.steps import Steps
from cascade_det.d2.structures import sample_of
from cascade_det.engine.averaging import WeightAverage
from cascade_det.engine.best_model import BestModel
from cascade_det.engine.devices import resolve_amp_dtype
from cascade_det.engine.hooks import EvalHook, PeriodicCheckpoint
from cascade_det.engine.run_control import RunControl
from cascade_det.engine.run_info import RunInfo, resume_or_load
from cascade_det.engine.solver import build_gradient_clipper, build_optimizer, build_scheduler
from cascade_det.engine.step import TrainingStep
from cascade_det.engine.training_modes import freeze_detector, training_mode
from cascade_det.parallel import distributed
from cascade_det.parallel.interrupts import InterruptRequest, interrupt_request

logger = logging.getLogger(__name__)

Results = dict[str, Any]


class Trainer(RunControl, DefaultTrainer):
    """Trains a model of Detectron2, ours or its own, as ``CASCADE`` and its own keys say.

    Args:
        cfg: a checked configuration.
        run: of this training.
        evaluate: gives the results of a model; ``None`` for a training without test sets.

    Attributes:
        iteration: the one that runs, or was completed last; from 0. Detectron2's ``iter`` may be
            one that was not begun.
        results: of the last evaluation, empty before it.
        finished: whether training came to a good end, by ``max_iter`` or by :meth:`stop`.
        last_checkpoint: the newest file that was saved or resumed, for messages.
    """

    def __init__(
        self, cfg: CfgNode, run: RunInfo, evaluate: Callable[[nn.Module], Results] | None = None
    ) -> None:
        # Not DefaultTrainer's own: its step, optimiser and checkpointer are others.
        TrainerBase.__init__(self)
        self.cfg = cfg
        self.run = run
        self.device = torch.device(cfg.MODEL.DEVICE)
        self.results: Results = {}
        self.finished = False
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.iteration = -1
        self.last_checkpoint: str | None = None
        self._evaluate = evaluate
        self._interrupted = False
        self._interrupt = InterruptRequest()
        self._arguments = config.trainer_arguments(cfg)
        model = self.build_model(cfg)
        decay = self._arguments["ema_decay"]
        self._average = WeightAverage(model, decay) if decay > 0 else None
        self._trainer = self._build_steps(cfg, model)
        self.scheduler = self.build_lr_scheduler(cfg, self._trainer.optimizer)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, save_to_disk=distributed.is_main())
        self.register_hooks(self.build_hooks())

    @property
    def module(self) -> nn.Module:
        """The model in training, which DistributedDataParallel keeps one level below."""
        return self._trainer.step.module

    @property
    def tested(self) -> nn.Module:
        """The model that is evaluated and saved: the one in training, or its average."""
        return self.module if self._average is None else self._average.module

    @property
    def history(self) -> StorageHistory:
        """What was measured, for the engine's hooks."""
        return StorageHistory(self.storage, self.iteration)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """``CASCADE.OPTIMIZER`` with Detectron2's parameter groups; clipping is the step's."""
        arguments = config.optimizer_arguments(cfg)
        arguments.pop("clip")
        return build_optimizer(model, **arguments)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: Optimizer) -> LambdaLR:
        """Detectron2's schedules."""
        return build_scheduler(optimizer, **config.scheduler_arguments(cfg))

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Batches:
        """Detectron2's, see :func:`cascade_det.d2.loader.build_train_loader`."""
        return build_train_loader(cfg)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        """What Detectron2's own ``test`` evaluates with."""
        return coco_evaluator(cfg, dataset_name, Path(cfg.OUTPUT_DIR, "inference"))

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's usual hooks, with the engine's in their places among them."""
        cfg, arguments = self.cfg, self._arguments
        found: list[HookBase | None] = [hooks.IterationTimer(), LearningRate()]
        if self._average is not None:
            found.append(as_detectron2_hook(self._average))
        if cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.tested):
            reader = cfg.clone()
            reader.defrost()
            reader.DATALOADER.NUM_WORKERS = 0
            loader = self.build_train_loader(reader)
            precise = (cfg.TEST.EVAL_PERIOD, self.tested, loader, cfg.TEST.PRECISE_BN.NUM_ITER)
            found.append(hooks.PreciseBN(*precise))
        period, max_to_keep = arguments["checkpoint_period"], arguments["max_to_keep"] or 0
        checkpoints = PeriodicCheckpoint(self.checkpointer, period, max_to_keep)
        found.append(as_detectron2_hook(checkpoints))
        if self._evaluate is not None:
            best = BestModel(self.checkpointer, arguments["best_metric"], arguments["patience"])
            found.append(as_detectron2_hook(EvalHook(arguments["eval_period"], self.evaluate)))
            found.append(as_detectron2_hook(best))
        if distributed.is_main():
            found.append(hooks.PeriodicWriter(self.build_writers(), arguments["log_period"]))
        return found

    def build_writers(self) -> list[EventWriter]:
        """Detectron2's, see :func:`cascade_det.d2.hooks.build_writers`."""
        return build_writers(self.cfg.OUTPUT_DIR, self.max_iter)

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on from the last checkpoint in ``OUTPUT_DIR``, or load ``MODEL.WEIGHTS``.

        Raises:
            CheckpointError: weights cannot be read or do not fit, or there is nothing to resume.
        """
        resume_or_load(self.checkpointer, self.cfg, resume=resume)
        self.start_iter = self.checkpointer.start_iter
        if self._average is None:
            self.checkpointer.load_resumed("training_weights", self.module)
        else:
            # The checkpoint's model is the average; what training goes on with is beside it.
            self._average.module.load_state_dict(self.module.state_dict())
            self.checkpointer.model = self._average.module
            self.checkpointer.add_checkpointable("training_weights", self.module)
        self.checkpointer.add_checkpointable("run", self.run)
        self.checkpointer.add_checkpointable("trainer", weakref.proxy(self))
        if resume:
            # That of the run, which may be another one than has been drawn for this start.
            seed_all_rng(self.run.seed + distributed.rank())

    def train(self) -> None:
        """Run to ``SOLVER.MAX_ITER``, or until patience ends it.

        Raises:
            FloatingPointError: training diverged; the message names stage, images and the file
                that the batch is in.
            DatasetError: an image cannot be read.
            Interrupted: a signal asked for an end; there is a checkpoint.
        """
        # Not TrainerBase's own: it logs a traceback of whatever ends it.
        self.finished = self.resumable = self._stopping = False
        self.iter, self.iteration = self.start_iter, self.start_iter - 1
        with (
            interrupt_request() as self._interrupt,
            EventStorage(max(self.iteration, 0)) as self.storage,
        ):
            try:
                self.before_train()
                # A hook may know that nothing is left to do.
                if not self._stopping:
                    self._run()
                self.finished = True
            finally:
                self.after_train()

    def after_train(self) -> None:
        """Give every hook its end, in their order, even if an earlier one fails at its own."""
        self.storage.iter = self.iter
        with ExitStack() as ends:
            for hook in reversed(self._hooks):
                ends.callback(hook.after_train)

    def evaluate(self) -> Results:
        """The results of what a checkpoint would hold."""
        assert self._evaluate is not None
        model = self.tested
        # The statistics of norms that are trained differ from process to process.
        distributed.synchronise_buffers(model)
        with _numpy_randomness_kept():
            return self._evaluate(model)

    def run_step(self) -> None:
        """One iteration."""
        self._trainer.iter = self.iter
        batch = self._trainer.next_batch()
        self.resumable = False
        self.iteration = self.iter
        self._interrupted = self._trainer.run_batch(
            batch,
            interrupted=bool(self._interrupt),
            last_checkpoint=lambda: self.last_checkpoint or "",
        )

    def _run(self) -> None:
        if self._is_complete():
            return
        self._trainer.data_loader = self.build_train_loader(self._seeded())
        if self.start_iter > 0:
            # Not again the regions and the augmentations that the run began with.
            seed_all_rng(self.run.seed + self.start_iter + distributed.rank())
        for iteration in range(self.start_iter, self.max_iter):
            self.iter = iteration
            self.before_step()
            self.run_step()
            self.after_step()
            if self._is_stopped(self._interrupted):
                return
        # That tells Detectron2's hooks of a good end.
        self.iter += 1

    def _seeded(self) -> CfgNode:
        """The configuration with a seed for the order of images: a resumed run has another one."""
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.SEED = self.run.seed + self.start_iter
        return cfg

    def _build_steps(self, cfg: CfgNode, model: nn.Module) -> Steps:
        freeze_detector(model)
        optimizer = self.build_optimizer(cfg, model)

        def metrics() -> Mapping[str, Tensor]:
            cascade = getattr(getattr(model, "roi_heads", None), "cascade", None)
            return {} if cascade is None else cascade.metrics

        step = TrainingStep(
            distributed.wrap(model),
            optimizer,
            metrics=metrics,
            amp_dtype=resolve_amp_dtype(self._arguments["amp_dtype"], self.device),
            clip_gradients=build_gradient_clipper(config.optimizer_arguments(cfg)["clip"]),
            accumulation_steps=self._arguments["accumulation_steps"],
            max_iter=self.max_iter,
            device=self.device,
            output_dir=cfg.OUTPUT_DIR,
            as_sample=sample_of,
        )
        steps = Steps(step)
        training_mode(step.detector)
        return steps


@contextmanager
def _numpy_randomness_kept() -> Iterator[None]:
    """Detectron2's augmentations draw from the global generators, even where nothing is random."""
    states = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(states[0])  # noqa: NPY002
        random.setstate(states[1])
