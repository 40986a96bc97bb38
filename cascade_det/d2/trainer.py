"""Detectron2's ``DefaultTrainer`` with the engine's step, best model, patience and averages."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer, TrainerBase, hooks
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.events import get_event_storage
from fvcore.nn.precise_bn import get_bn_modules
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from cascade_det import config
from cascade_det.d2.checkpoint import Checkpointer
from cascade_det.d2.hooks import Figures, LearningRate, as_detectron2_hook
from cascade_det.d2.structures import sample_of
from cascade_det.engine import distributed
from cascade_det.engine.averaging import WeightAverage
from cascade_det.engine.best_model import BestModel
from cascade_det.engine.devices import resolve_amp_dtype
from cascade_det.engine.hooks import FINAL, figures_of, periodic_checkpoints
from cascade_det.engine.interrupts import (
    Interrupted,
    InterruptRequest,
    ending_at_once,
    interrupt_request,
)
from cascade_det.engine.processes import USER_ERRORS
from cascade_det.engine.run_info import RunInfo, resume_or_load
from cascade_det.engine.solver import build_gradient_clipper, build_optimizer, build_scheduler
from cascade_det.engine.step import TrainingStep
from cascade_det.engine.training_state import load_optimizer_state, optimizer_state

logger = logging.getLogger(__name__)

Results = dict[str, Any]


class Trainer(DefaultTrainer):
    """Trains a model of Detectron2, ours or its own, as ``CASCADE`` and its own keys say.

    Args:
        cfg: a checked configuration.
        run: of this training.
        evaluate: gives the results of a model; ``None`` for a training without test sets.

    Attributes:
        results: of the last evaluation, empty before it.
        finished: whether training came to a good end.
    """

    def __init__(
        self, cfg: CfgNode, run: RunInfo, evaluate: Callable[[nn.Module], Results] | None = None
    ) -> None:
        # Not DefaultTrainer's own: its step, optimiser and checkpointer are others.
        TrainerBase.__init__(self)
        self.cfg = cfg
        self.run = run
        self.results: Results = {}
        self.finished = False
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self._evaluate = evaluate
        self._stopping = False
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
    def iteration(self) -> int:
        """The iteration that runs, or was completed last."""
        return min(self.iter, self.max_iter - 1)

    @property
    def history(self) -> Figures:
        """What was measured, for the engine's hooks."""
        return Figures(self.storage, self.max_iter)

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
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        """What Detectron2's own ``test`` evaluates with."""
        return COCOEvaluator(dataset_name, output_dir=f"{cfg.OUTPUT_DIR}/inference")

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's usual hooks, with the engine's in their places among them."""
        cfg, arguments = self.cfg, self._arguments
        found: list[HookBase | None] = [hooks.IterationTimer(), LearningRate()]
        if self._average is not None:
            found.append(as_detectron2_hook(self._average))
        if cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.module):
            reader = cfg.clone()
            reader.defrost()
            reader.DATALOADER.NUM_WORKERS = 0
            loader = self.build_train_loader(reader)
            precise = (cfg.TEST.EVAL_PERIOD, self.module, loader, cfg.TEST.PRECISE_BN.NUM_ITER)
            found.append(hooks.PreciseBN(*precise))
        if distributed.is_main():
            found.append(
                hooks.PeriodicCheckpointer(
                    self.checkpointer,
                    arguments["checkpoint_period"],
                    max_to_keep=arguments["max_to_keep"],
                )
            )
        if self._evaluate is not None:
            best = BestModel(self.checkpointer, arguments["best_metric"], arguments["patience"])
            found.append(hooks.EvalHook(arguments["eval_period"], self.evaluate))
            found.append(as_detectron2_hook(best))
        if distributed.is_main():
            found.append(hooks.PeriodicWriter(self.build_writers(), arguments["log_period"]))
        return found

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
        for hook in self._hooks:
            if isinstance(hook, hooks.PeriodicCheckpointer):
                hook.recent_checkpoints = periodic_checkpoints(self.cfg.OUTPUT_DIR, self.start_iter)

    def train(self) -> None:
        """Run to ``SOLVER.MAX_ITER``, or until patience ends it.

        Raises:
            FloatingPointError: training diverged; the message names stage, images and the file
                that the batch is in.
            Interrupted: a signal asked for an end; there is a checkpoint.
        """
        if self.start_iter >= self.max_iter:
            logger.info(
                "This training is complete: all %d iterations of SOLVER.MAX_ITER are done. Raise "
                "SOLVER.MAX_ITER to train longer. Its weights are evaluated once more.",
                self.max_iter,
            )
            self.evaluate()
            return
        with interrupt_request() as self._interrupt:
            try:
                TrainerBase.train(self, self.start_iter, self.max_iter)
            except _End as end:
                if end.error is not None:
                    raise end.error from None

    def evaluate(self) -> dict[str, float]:
        """Evaluate what a checkpoint would hold; all goes to ``results``, figures are returned."""
        if self._evaluate is None:
            return {}
        model = self.tested
        # The statistics of norms that are trained differ from process to process.
        distributed.synchronise_buffers(model)
        where = f"Interrupted in the evaluation after iteration {self.iteration}"
        with ending_at_once(self._interrupt, where):
            self.results = self._evaluate(model)
        return dict(figures_of(self.results))

    def stop(self) -> None:
        """End training, as if done, after the hooks of this iteration."""
        self._stopping = True

    def run_step(self) -> None:
        """One iteration."""
        self._trainer.iter = self.iter
        try:
            self._interrupted = self._trainer.run_batch(
                interrupted=bool(self._interrupt),
                last_checkpoint=self.checkpointer.get_checkpoint_file,
            )
        except USER_ERRORS as error:
            raise _End(error) from None

    def after_step(self) -> None:
        """Call the hooks; end where one of them, or a signal, asked for it."""
        try:
            super().after_step()
        except Interrupted as error:
            self._end_interrupted(error)
        except USER_ERRORS as error:
            raise _End(error) from None
        if self._stopping:
            self.checkpointer.save(FINAL, iteration=self.iter)
            raise _End
        if self._interrupted and self.iter < self.max_iter - 1:
            where = f"Interrupted after iteration {self.iter} of {self.max_iter}"
            self._end_interrupted(Interrupted(where))

    def after_train(self) -> None:
        """Call the hooks."""
        self.finished = self._stopping or self.iter >= self.max_iter
        super().after_train()

    def _end_interrupted(self, error: Interrupted) -> NoReturn:
        self.checkpointer.save(f"model_{self.iter:07d}", iteration=self.iter)
        raise _End(error) from None

    def _build_steps(self, cfg: CfgNode, model: nn.Module) -> _Steps:
        arguments, device = self._arguments, torch.device(cfg.MODEL.DEVICE)
        optimizer = self.build_optimizer(cfg, model)

        def metrics() -> Mapping[str, Tensor]:
            cascade = getattr(getattr(model, "roi_heads", None), "cascade", None)
            return {} if cascade is None else cascade.metrics

        step = TrainingStep(
            distributed.wrap(model),
            optimizer,
            metrics=metrics,
            amp_dtype=resolve_amp_dtype(arguments["amp_dtype"], device),
            clip_gradients=build_gradient_clipper(config.optimizer_arguments(cfg)["clip"]),
            accumulation_steps=arguments["accumulation_steps"],
            device=device,
            output_dir=cfg.OUTPUT_DIR,
            as_sample=sample_of,
        )
        return _Steps(step, self.build_train_loader(cfg))


class _End(BaseException):
    """The end of a training, past ``except Exception``, which would print a traceback."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error


class _Steps(SimpleTrainer):
    """The engine's step where Detectron2 has its own."""

    def __init__(self, step: TrainingStep, loader: Any) -> None:
        super().__init__(step.detector, loader, step.optimizer)
        self.step = step

    def run_batch(self, *, interrupted: bool, last_checkpoint: Callable[[], str]) -> bool:
        """Train on the next batch; whether any process was asked to stop."""
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        figures, stop = self.step.run(
            batch, self.iter, interrupted=interrupted, last_checkpoint=last_checkpoint
        )
        # The heads have put theirs into the storage themselves.
        rest = {name: figures[name] for name in figures.keys() - self.step.metrics().keys()}
        get_event_storage().put_scalars(data_time=data_time, **rest)
        return stop

    def state_dict(self) -> dict[str, Any]:
        """What goes on after a resume."""
        state = TrainerBase.state_dict(self)
        optimizer = optimizer_state(self.optimizer, self.step.module)
        return {**state, "optimizer": optimizer, "scaler": self.step.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`, with the settings of the configuration."""
        TrainerBase.load_state_dict(self, state)
        load_optimizer_state(self.optimizer, self.step.module, state["optimizer"])
        self.step.load_state_dict(state["scaler"])
