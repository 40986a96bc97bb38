"""The trainer of a run, the same for detectors and segmenters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.data.samples import Batch
from cascade_det.engine.averaging import WeightAverage
from cascade_det.engine.best_model import BestModel
from cascade_det.engine.checkpoint import Checkpointer
from cascade_det.engine.devices import resolve_amp_dtype
from cascade_det.engine.hooks import EvalHook, Hook, PeriodicCheckpoint, WriterHook
from cascade_det.engine.solver import build_gradient_clipper, build_optimizer, build_scheduler
from cascade_det.engine.step import TrainingStep
from cascade_det.engine.trainer import Trainer
from cascade_det.engine.writers import ConsoleWriter, JsonWriter, TensorBoardWriter, Writer
from cascade_det.parallel import distributed
from cascade_det.standalone.detector import Detector
from cascade_det.standalone.segmenter import SemanticSegmentor

Model = TypeVar("Model", Detector, SemanticSegmentor)


def build_trainer(
    cfg: CfgNode,
    model: Model,
    loader: Iterable[Batch],
    checkpointer: Checkpointer,
    evaluation: Callable[[Model], Callable[[], Mapping[str, Any]]] | None,
) -> Trainer:
    """The trainer of a run: optimiser, schedule, checkpoints, evaluation and writers.

    Args:
        cfg: a checked configuration.
        model: returns losses of a batch.
        loader: endless batches.
        checkpointer: of the model; its ``start_iter`` is the first iteration.
        evaluation: for the model to test, the function of the evaluation hook; ``None`` for no
            evaluation.
    """
    arguments = config.trainer_arguments(cfg)
    amp_dtype = resolve_amp_dtype(arguments["amp_dtype"], model.device)
    optimizer_arguments = config.optimizer_arguments(cfg)
    clip = build_gradient_clipper(optimizer_arguments.pop("clip"))
    optimizer = build_optimizer(model, **optimizer_arguments)
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
    if evaluation is not None:
        hooks.append(EvalHook(arguments["eval_period"], evaluation(tested)))
        hooks.append(BestModel(checkpointer, arguments["best_metric"], arguments["patience"]))
    hooks.append(WriterHook(_writers(cfg), arguments["log_period"]))
    step = TrainingStep(
        distributed.wrap(model),
        optimizer,
        amp_dtype=amp_dtype,
        clip_gradients=clip,
        accumulation_steps=arguments["accumulation_steps"],
        max_iter=arguments["max_iter"],
        device=model.device,
        output_dir=cfg.OUTPUT_DIR,
    )
    return Trainer(
        step,
        loader,
        build_scheduler(optimizer, **config.scheduler_arguments(cfg)),
        max_iter=arguments["max_iter"],
        start_iter=checkpointer.start_iter,
        hooks=hooks,
    )


def _writers(cfg: CfgNode) -> list[Writer]:
    if not distributed.is_main():
        return []
    folder = Path(cfg.OUTPUT_DIR)
    return [
        JsonWriter(folder / "metrics.json"),
        TensorBoardWriter(folder),
        ConsoleWriter(cfg.SOLVER.MAX_ITER),
    ]
