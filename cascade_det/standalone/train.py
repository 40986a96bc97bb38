"""Training of a configuration: the wiring of data, detector, engine and evaluation."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.data.loader import build_train_loader
from cascade_det.engine.checkpoint import Checkpointer
from cascade_det.engine.hooks import EarlyStopping, EvalHook, PeriodicCheckpoint, WriterHook
from cascade_det.engine.solver import build_gradient_clipper, build_optimizer, build_scheduler
from cascade_det.engine.trainer import Trainer
from cascade_det.engine.writers import ConsoleWriter, JsonWriter, TensorBoardWriter
from cascade_det.standalone.build import build_detector, set_backends
from cascade_det.standalone.datasets import check_class_names, load_datasets
from cascade_det.standalone.detector import Detector
from cascade_det.standalone.evaluate import evaluate_all

logger = logging.getLogger(__name__)


@dataclass
class RunInfo:
    """What a checkpoint says beyond weights: enough to resume, and to name what it detects.

    Attributes:
        seed: of the data order and of everything random.
        class_names: K names.
        category_ids: K ids that the training data set gives these classes.
    """

    seed: int
    class_names: list[str]
    category_ids: list[int]

    def state_dict(self) -> dict[str, Any]:
        """Plain types, for a checkpoint."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the seed of the resumed run; the classes are those of the data."""
        self.seed = int(state["seed"])


def train(cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
    """Train a detector, with checkpoints, figures and evaluation in ``OUTPUT_DIR``.

    Args:
        cfg: a checked configuration; ``SEED`` below 0 draws a seed.
        resume: go on from the last checkpoint in ``OUTPUT_DIR`` if there is one.

    Returns:
        The results of the last evaluation, see ``evaluate``; empty without ``DATASETS.TEST``.

    Raises:
        ConfigError: if ``MODEL.ROI_HEADS.NUM_CLASSES`` is not that of the data.
        DatasetError: if data are missing or wrong.
        CheckpointError: if weights cannot be read or do not fit.
        FloatingPointError: if training diverges.
    """
    output_dir = Path(cfg.OUTPUT_DIR)
    datasets = load_datasets(cfg, train=True)
    test_datasets = load_datasets(cfg, train=False)
    for dataset in test_datasets:
        check_class_names(datasets[0], dataset)
    loader_arguments = config.train_loader_arguments(cfg)
    info = RunInfo(
        seed=loader_arguments.pop("seed"),
        class_names=list(datasets[0].class_names),
        category_ids=list(datasets[0].category_ids),
    )
    if info.seed < 0:
        info.seed = secrets.randbelow(2**31)
        logger.info("SEED is negative: drew %d", info.seed)
    torch.manual_seed(info.seed)
    set_backends(cfg)
    detector = build_detector(cfg)
    checkpointer = Checkpointer(detector, output_dir)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    checkpointer.add_checkpointable("run", info)
    if not cfg.MODEL.WEIGHTS and checkpointer.start_iter == 0:
        _warn_of_frozen_noise(cfg)
    trainer = _build_trainer(
        cfg,
        detector,
        build_train_loader(
            datasets,
            **config.input_arguments(cfg, train=True),
            **loader_arguments,
            seed=info.seed,
            start_batch=checkpointer.start_iter,
        ),
        checkpointer,
        evaluate=lambda: evaluate_all(cfg, detector, test_datasets, output_dir),
    )
    trainer.train()
    return trainer.results


def _warn_of_frozen_noise(cfg: CfgNode) -> None:
    """From random weights, what is frozen stays random: seldom meant, and seen in the AP alone."""
    freeze_at, norm = cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.RESNETS.NORM
    if freeze_at > 0 or norm == "FrozenBN":
        logger.warning(
            "MODEL.WEIGHTS is empty, but MODEL.BACKBONE.FREEZE_AT is %d and MODEL.RESNETS.NORM is "
            "%s: give a file of weights, or set FREEZE_AT 0 and a NORM that is trained (BN, GN)",
            freeze_at,
            norm,
        )


def _build_trainer(
    cfg: CfgNode,
    detector: Detector,
    loader: Any,
    checkpointer: Checkpointer,
    *,
    evaluate: Callable[[], Mapping[str, Any]],
) -> Trainer:
    arguments = config.trainer_arguments(cfg)
    optimizer_arguments = config.optimizer_arguments(cfg)
    clip = build_gradient_clipper(optimizer_arguments.pop("clip"))
    optimizer = build_optimizer(detector, **optimizer_arguments)
    output_dir = Path(cfg.OUTPUT_DIR)
    hooks = [
        PeriodicCheckpoint(
            checkpointer, arguments["checkpoint_period"], arguments["max_to_keep"] or 0
        ),
        *([EvalHook(arguments["eval_period"], evaluate)] if cfg.DATASETS.TEST else []),
        EarlyStopping(arguments["best_metric"], arguments["patience"]),
        WriterHook(
            [
                JsonWriter(output_dir / "metrics.json"),
                TensorBoardWriter(output_dir),
                ConsoleWriter(arguments["max_iter"]),
            ],
            arguments["log_period"],
        ),
    ]
    return Trainer(
        detector,
        loader,
        optimizer,
        build_scheduler(optimizer, **config.scheduler_arguments(cfg)),
        max_iter=arguments["max_iter"],
        start_iter=checkpointer.start_iter,
        hooks=hooks,
        amp_dtype=_amp_dtype(arguments["amp_dtype"], detector.device),
        clip_gradients=clip,
        device=detector.device,
    )


def _amp_dtype(name: str | None, device: torch.device) -> str | None:
    """``auto`` is float16 on GPUs, bfloat16 on CPUs with instructions for it, float32 on others."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "float16"
    # Without such instructions bfloat16 is emulated, many times slower than float32.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"):
        return "bfloat16"
    logger.warning("SOLVER.AMP: this CPU is not known to compute in bfloat16, training in float32")
    return None
