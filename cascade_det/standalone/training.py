"""The trainer of a run, the same for detectors and segmenters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.data.coco import CocoDataset
from cascade_det.data.samples import Batch
from cascade_det.data.semantic import SemanticDataset
from cascade_det.engine.averaging import WeightAverage
from cascade_det.engine.best_model import BestModel
from cascade_det.engine.checkpoint import Checkpointer
from cascade_det.engine.devices import resolve_amp_dtype
from cascade_det.engine.hooks import EvalHook, Hook, PeriodicCheckpoint, WriterHook
from cascade_det.engine.loggers import logger_hooks
from cascade_det.engine.output_dir import record_start
from cascade_det.engine.run_info import RunInfo
from cascade_det.engine.run_weights import resume_or_load
from cascade_det.engine.solver import build_gradient_clipper, build_optimizer, build_scheduler
from cascade_det.engine.step import TrainingStep
from cascade_det.engine.trainer import Trainer
from cascade_det.engine.training_modes import freeze_detector, training_mode
from cascade_det.engine.validation import validation_losses
from cascade_det.engine.writers import ConsoleWriter, JsonWriter, TensorBoardWriter, Writer
from cascade_det.parallel import distributed
from cascade_det.standalone.detector import Detector
from cascade_det.standalone.segmenter_base import SegmenterBase

Model = TypeVar("Model", Detector, SegmenterBase)


def start_run(
    cfg: CfgNode,
    build: Callable[[CfgNode], Model],
    dataset: CocoDataset | SemanticDataset,
    *,
    resume: bool,
) -> tuple[Model, Checkpointer, RunInfo]:
    """The model of a run with its weights, new or resumed, and a seed for all that is random.

    Args:
        cfg: a checked configuration.
        build: builds the model.
        dataset: has the classes of the run.
        resume: continue from the last checkpoint in ``OUTPUT_DIR``.

    Raises:
        CheckpointError: weights cannot be read or do not fit, or there is nothing to resume.
    """
    info = RunInfo.of(cfg, dataset, "standalone")
    torch.manual_seed(info.seed)
    model = build(cfg)
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, save_to_disk=distributed.is_main())
    resume_or_load(checkpointer, cfg, resume=resume)
    checkpointer.add_checkpointable("run", info)
    record_start(cfg, resume=resume)
    if distributed.rank() > 0:
        # Every process draws its own regions and paths; rank 0 those of a run with one process.
        torch.manual_seed(info.seed + distributed.rank())
    return model, checkpointer, info


def build_trainer(
    cfg: CfgNode,
    model: Model,
    loader: Iterable[Batch],
    checkpointer: Checkpointer,
    evaluate: Callable[[Model], Mapping[str, Any]] | None,
    annotated: Callable[[], Sequence[Iterable[Batch]]],
) -> Trainer:
    """The trainer of a run: optimiser, schedule, checkpoints, evaluation and writers.

    Args:
        cfg: a checked configuration.
        model: returns losses of a batch.
        loader: endless batches.
        checkpointer: of the model; its ``start_iter`` is the first iteration.
        evaluate: returns the metrics of the test sets; ``None`` for no evaluation.
        annotated: loaders of the test sets with ground truth, for their losses.
    """
    arguments = config.trainer_arguments(cfg)
    amp_dtype = resolve_amp_dtype(arguments["amp_dtype"], model.device)
    hooks: list[Hook] = []
    tested = model
    if arguments["ema_decay"] > 0:
        average = WeightAverage(model, arguments["ema_decay"])
        hooks.append(average)
        # The checkpoint's model is the average; the weights in training are saved beside it.
        assert isinstance(average.module, type(model))
        tested = checkpointer.model = average.module
        checkpointer.add_checkpointable("training_weights", model)
    else:
        checkpointer.load_resumed("training_weights", model)
    hooks.append(
        PeriodicCheckpoint(checkpointer, arguments["checkpoint_period"], arguments["max_to_keep"])
    )
    if evaluate is not None:
        with_losses = annotated if arguments["validation_loss"] else None
        evaluation = partial(_evaluate, tested, evaluate, with_losses, amp_dtype)
        hooks.append(EvalHook(arguments["eval_period"], evaluation))
        hooks.append(BestModel(checkpointer, arguments["best_metric"], arguments["patience"]))
    hooks.append(WriterHook(_writers(cfg), arguments["log_period"]))
    hooks += logger_hooks(cfg)
    step = build_step(cfg, model, amp_dtype)
    return Trainer(
        step,
        loader,
        build_scheduler(step.optimizer, **config.scheduler_arguments(cfg)),
        max_iter=arguments["max_iter"],
        start_iter=checkpointer.start_iter,
        hooks=hooks,
    )


def build_step(cfg: CfgNode, model: Model, amp_dtype: torch.dtype | None) -> TrainingStep:
    """The training step of a configuration, with its optimiser."""
    arguments = config.trainer_arguments(cfg)
    optimizer_arguments = config.optimizer_arguments(cfg)
    clip = build_gradient_clipper(optimizer_arguments.pop("clip"))
    return TrainingStep(
        distributed.wrap(model),
        build_optimizer(model, **optimizer_arguments),
        amp_dtype=amp_dtype,
        clip_gradients=clip,
        accumulation_steps=arguments["accumulation_steps"],
        max_iter=arguments["max_iter"],
        device=model.device,
        output_dir=cfg.OUTPUT_DIR,
    )


def build_trial(
    cfg: CfgNode, build: Callable[[CfgNode], Model], loader: Callable[[CfgNode], Iterable[Batch]]
) -> tuple[TrainingStep, Iterable[Batch]]:
    """A step on a model of its own, to try batch sizes with, and the batches of ``loader``."""
    model = build(cfg)
    resume_or_load(Checkpointer(model, cfg.OUTPUT_DIR, save_to_disk=False), cfg, resume=False)
    freeze_detector(model)
    amp_dtype = resolve_amp_dtype(config.trainer_arguments(cfg)["amp_dtype"], model.device)
    step = build_step(cfg, model, amp_dtype)
    training_mode(model)
    return step, loader(cfg)


def _evaluate(
    model: Model,
    evaluate: Callable[[Model], Mapping[str, Any]],
    annotated: Callable[[], Sequence[Iterable[Batch]]] | None,
    amp_dtype: torch.dtype | None,
) -> dict[str, Any]:
    # Running statistics of norms differ between processes.
    distributed.synchronise_buffers(model)
    results = dict(evaluate(model))
    if annotated is not None:
        batches = (batch for loader in annotated() for batch in loader)
        results["validation"] = validation_losses(model, batches, amp_dtype=amp_dtype)
    return results


def _writers(cfg: CfgNode) -> list[Writer]:
    if not distributed.is_main():
        return []
    folder = Path(cfg.OUTPUT_DIR)
    return [
        JsonWriter(folder / "metrics.json"),
        TensorBoardWriter(folder),
        ConsoleWriter(cfg.SOLVER.MAX_ITER),
    ]
