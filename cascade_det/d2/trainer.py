"""A trainer of Detectron2 with the engine's step, checkpoints, evaluation and averages."""

from __future__ import annotations

import logging
import random
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, hooks
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
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
from cascade_det.d2.loader import Batches, Inputs, build_test_loader, build_train_loader
from cascade_det.d2.structures import to_sample
from cascade_det.engine.averaging import WeightAverage
from cascade_det.engine.best_model import BestModel
from cascade_det.engine.devices import resolve_amp_dtype
from cascade_det.engine.hooks import EvalHook, PeriodicCheckpoint
from cascade_det.engine.loggers import logger_hooks
from cascade_det.engine.loop import TrainingLoop
from cascade_det.engine.precision import channels_last_in_half
from cascade_det.engine.run_info import RunInfo
from cascade_det.engine.run_weights import resume_or_load
from cascade_det.engine.solver import build_gradient_clipper, build_optimizer, build_scheduler
from cascade_det.engine.step import TrainingStep
from cascade_det.engine.training_modes import freeze_detector, training_mode
from cascade_det.engine.training_state import load_optimizer_state, optimizer_state
from cascade_det.parallel import distributed
from cascade_det.parallel.interrupts import interrupt_request

logger = logging.getLogger(__name__)

Results = dict[str, Any]


class Trainer(TrainingLoop, TrainerBase):
    """Trains a model of Detectron2, with our heads or its own, on its own and our ``CASCADE`` keys.

    A ``TrainerBase``, because the loop, step, checkpoints and hooks of ``DefaultTrainer`` are
    replaced. What users of a ``DefaultTrainer`` reach for has the same name here: ``cfg``,
    ``model``, ``optimizer``, ``data_loader``, ``scheduler``, ``checkpointer``, ``resume_or_load``,
    ``test``, every ``build_*``, and the layout of the checkpoint.

    Args:
        cfg: a checked configuration.
        run: seed, classes and host of this training, kept in its checkpoints.
        evaluate: returns the results of a model; ``None`` for a training without test sets.

    Attributes:
        step: computes one iteration.
        data_loader: of the training batches; ``None`` until training starts.
        iteration: the running or last completed iteration, from 0. Detectron2's ``iter`` may be
            one that has not started.
        results: of the last evaluation; empty before it.
        finished: whether training ended well, at ``max_iter`` or by :meth:`stop`.
        last_checkpoint: the newest file saved or resumed, for messages.
    """

    def __init__(
        self, cfg: CfgNode, run: RunInfo, evaluate: Callable[[nn.Module], Results] | None = None
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.run = run
        self.device = torch.device(cfg.MODEL.DEVICE)
        self.results: Results = {}
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.iteration = -1
        self.data_loader: Iterable[list[Inputs]] | None = None
        self._batches: Iterator[list[Inputs]]
        self._evaluate = evaluate
        self._interrupted = False
        self._arguments = config.trainer_arguments(cfg)
        model = self.build_model(cfg)
        decay = self._arguments["ema_decay"]
        self._average = WeightAverage(model, decay) if decay > 0 else None
        freeze_detector(model)
        self.step = build_step(cfg, model, self.build_optimizer(cfg, model))
        self.scheduler = self.build_lr_scheduler(cfg, self.optimizer)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, save_to_disk=distributed.is_main())
        self.register_hooks(self.build_hooks())

    @property
    def model(self) -> nn.Module:
        """The model in training, in DistributedDataParallel if there are several processes."""
        return self.step.detector

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the training step."""
        return self.step.optimizer

    @property
    def module(self) -> nn.Module:
        """The model in training, without DistributedDataParallel."""
        return self.step.module

    @property
    def tested(self) -> nn.Module:
        """The model that is evaluated and saved: the one in training, or its average."""
        return self.module if self._average is None else self._average.module

    @property
    def history(self) -> StorageHistory:
        """The event storage as the engine's hooks read it."""
        return StorageHistory(self.storage, self.iteration)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Detectron2's model of a configuration; the log describes it."""
        return DefaultTrainer.build_model(cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """``CASCADE.OPTIMIZER``, see the engine's ``build_optimizer``; clipping is the step's."""
        arguments = config.optimizer_arguments(cfg)
        arguments.pop("clip")
        return build_optimizer(model, **arguments)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: Optimizer) -> LambdaLR:
        """Detectron2's schedules."""
        return build_scheduler(optimizer, **config.scheduler_arguments(cfg))

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Batches:
        """See :func:`cascade_det.d2.loader.build_train_loader`."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Batches:
        """See :func:`cascade_det.d2.loader.build_test_loader`."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        """Detectron2's COCO evaluator, which :meth:`test` uses."""
        return coco_evaluator(cfg, dataset_name, Path(cfg.OUTPUT_DIR, "inference"))

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: Sequence[DatasetEvaluator] | None = None
    ) -> Results:
        """Evaluate a model on ``DATASETS.TEST`` as ``DefaultTrainer.test`` does."""
        return DefaultTrainer.test.__func__(cls, cfg, model, evaluators)

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's usual hooks, some replaced by the engine's; the order matters."""
        cfg, arguments = self.cfg, self._arguments
        found: list[HookBase | None] = [hooks.IterationTimer(), LearningRate()]
        if self._average is not None:
            found.append(as_detectron2_hook(self._average))
        if cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.tested):
            reader = config.changed(cfg, "DATALOADER.NUM_WORKERS", 0)
            found.append(
                hooks.PreciseBN(
                    cfg.TEST.EVAL_PERIOD,
                    self.tested,
                    self.train_batches(reader, 0),
                    cfg.TEST.PRECISE_BN.NUM_ITER,
                )
            )
        period, max_to_keep = arguments["checkpoint_period"], arguments["max_to_keep"]
        checkpoints = PeriodicCheckpoint(self.checkpointer, period, max_to_keep)
        found.append(as_detectron2_hook(checkpoints))
        if self._evaluate is not None:
            best = BestModel(self.checkpointer, arguments["best_metric"], arguments["patience"])
            found.append(as_detectron2_hook(EvalHook(arguments["eval_period"], self.evaluate)))
            found.append(as_detectron2_hook(best))
        if distributed.is_main():
            found.append(hooks.PeriodicWriter(self.build_writers(), arguments["log_period"]))
        return [*found, *map(as_detectron2_hook, logger_hooks(cfg))]

    def build_writers(self) -> list[EventWriter]:
        """See :func:`cascade_det.d2.hooks.build_writers`."""
        return build_writers(self.cfg.OUTPUT_DIR, self.max_iter)

    def train_batches(self, cfg: CfgNode, start: int) -> Iterable[list[Inputs]]:
        """Endless batches from iteration ``start`` on, in another order for each ``start``."""
        return self.build_train_loader(config.changed(cfg, "SEED", self.run.seed + start))

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
            # The checkpoint's model is the average; the weights in training are saved beside it.
            self._average.module.load_state_dict(self.module.state_dict())
            self.checkpointer.model = self._average.module
            self.checkpointer.add_checkpointable("training_weights", self.module)
        self.checkpointer.add_checkpointable("run", self.run)
        self.checkpointer.add_checkpointable("trainer", weakref.proxy(self))
        if resume:
            # The run's own seed replaces the one drawn at this start.
            seed_all_rng(self.run.seed + distributed.rank())

    def train(self) -> None:
        """Run to ``SOLVER.MAX_ITER``, or until patience ends it.

        Raises:
            FloatingPointError: training diverged; the message names stage, images and the file
                that the batch is in.
            DatasetError: an image cannot be read.
            Interrupted: a signal asked for an end; there is a checkpoint.
        """
        # Not TrainerBase.train, which logs a traceback of every error.
        self.finished = self.resumable = self._stopping = False
        self.iter, self.iteration = self.start_iter, self.start_iter - 1
        with (
            interrupt_request() as self._interrupt,
            EventStorage(max(self.iteration, 0)) as self.storage,
        ):
            try:
                self.before_train()
                # A hook may have stopped the training before its first step.
                if not self._stopping:
                    self._run()
                self.finished = True
            finally:
                self.after_train()

    def after_train(self) -> None:
        """Call ``after_train`` of every hook in order, even if an earlier one fails."""
        self.storage.iter = self.iter
        with ExitStack() as ends:
            for hook in reversed(self._hooks):
                ends.callback(hook.after_train)

    def evaluate(self) -> Results:
        """Results of the model that a checkpoint would hold."""
        assert self._evaluate is not None
        model = self.tested
        # Running statistics of norms differ between processes.
        distributed.synchronise_buffers(model)
        with _keep_random_state():
            return self._evaluate(model)

    def run_step(self) -> None:
        """Train on the next batch."""
        start = time.perf_counter()
        batch = next(self._batches)
        data_time = time.perf_counter() - start
        metrics, self._interrupted = self._train_on(batch, self.iter)
        # The heads put their own metrics into the storage.
        logged = self.step.metrics()
        rest = {name: value for name, value in metrics.items() if name not in logged}
        self.storage.put_scalars(data_time=data_time, **rest)

    def state_dict(self) -> dict[str, Any]:
        """Everything beside the weights that a resumed run needs, as ``DefaultTrainer`` has it."""
        step = {
            "iteration": max(self.iteration, 0),
            "optimizer": optimizer_state(self.optimizer, self.module),
            "scaler": self.step.state_dict(),
        }
        return {**super().state_dict(), "_trainer": step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`, with the settings of the configuration."""
        super().load_state_dict(state)
        step = state["_trainer"]
        self.iteration = step["iteration"]
        load_optimizer_state(self.optimizer, self.module, step["optimizer"])
        self.step.load_state_dict(step["scaler"])

    def _run(self) -> None:
        if self._is_complete():
            return
        self.data_loader = self.train_batches(self.cfg, self.start_iter)
        if self.start_iter > 0:
            # Otherwise sampling and augmentation would repeat those of the first iterations.
            seed_all_rng(self.run.seed + self.start_iter + distributed.rank())
        self._batches = iter(self.data_loader)
        for iteration in range(self.start_iter, self.max_iter):
            self.iter = iteration
            self.before_step()
            self.run_step()
            self.after_step()
            if self._is_stopped(self._interrupted):
                return
        # Detectron2's hooks recognise a complete training by this.
        self.iter += 1


def build_step(cfg: CfgNode, model: nn.Module, optimizer: Optimizer) -> TrainingStep:
    """The engine's step for a model of Detectron2."""
    if isinstance(backbone := getattr(model, "backbone", None), nn.Module):
        backbone.register_forward_pre_hook(_as_convolved)

    def metrics() -> Mapping[str, Tensor]:
        cascade = getattr(getattr(model, "roi_heads", None), "cascade", None)
        return {} if cascade is None else cascade.metrics

    arguments, device = config.trainer_arguments(cfg), torch.device(cfg.MODEL.DEVICE)
    step = TrainingStep(
        distributed.wrap(model),
        optimizer,
        metrics=metrics,
        amp_dtype=resolve_amp_dtype(arguments["amp_dtype"], device),
        clip_gradients=build_gradient_clipper(config.optimizer_arguments(cfg)["clip"]),
        accumulation_steps=arguments["accumulation_steps"],
        max_iter=arguments["max_iter"],
        device=device,
        output_dir=cfg.OUTPUT_DIR,
        as_sample=to_sample,
    )
    training_mode(step.detector)
    return step


def _as_convolved(backbone: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    # A backbone of the user's own may take more than a batch of images, or something else.
    return tuple(
        channels_last_in_half(x) if isinstance(x, Tensor) and x.dim() == 4 else x for x in inputs
    )


@contextmanager
def _keep_random_state() -> Iterator[None]:
    """Restore the states of ``numpy`` and ``random``, from which Detectron2's mappers draw."""
    states = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(states[0])  # noqa: NPY002
        random.setstate(states[1])
