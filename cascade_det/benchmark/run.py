"""Runs all measurements of a benchmark and writes their results."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from cascade_det import config
from cascade_det.benchmark.accuracy import measure_accuracy
from cascade_det.benchmark.attention_memory import compare_attention
from cascade_det.benchmark.backbones import measure_backbones
from cascade_det.benchmark.comparison import (
    compare_heads,
    compare_masks,
    compare_parts,
    compare_training,
    compare_whole,
)
from cascade_det.benchmark.limits import measure_limits
from cascade_det.benchmark.machine import describe
from cascade_det.benchmark.memory import compare_memory
from cascade_det.benchmark.models import BenchmarkModel, open_models
from cascade_det.benchmark.options import (
    MODELS,
    OF_SEGMENTERS,
    SEGMENTERS,
    WITH_MODELS,
    Options,
)
from cascade_det.benchmark.picture import plot_benchmark
from cascade_det.benchmark.report import format_benchmark
from cascade_det.benchmark.segmenters import SegmenterSetup, measurements, open_segmenters
from cascade_det.benchmark.setup import Setup, read_config
from cascade_det.benchmark.targets import EMULATED, hold_targets
from cascade_det.benchmark.tiles import measure_tiles
from cascade_det.benchmark.training import open_training_steps, trainable
from cascade_det.benchmark.waits import measure_waits
from cascade_det.engine.devices import has_bfloat16
from cascade_det.engine.log import setup_logging
from cascade_det.errors import ConfigError
from cascade_det.files import atomic_path, write_json

logger = logging.getLogger(__name__)

_TRAINING_IMAGES = 2
# Memory is measured for these only: each takes its own process.
_MEMORY_MODELS = ("ours", "ours-fast", "ours-fast-exits", "detectron2-cascade")

Results = dict[str, Any]
Models = Mapping[str, BenchmarkModel]
Measurements = Mapping[str, Callable[[], Any]]


def run_benchmark(options: Options) -> Results:
    """Run all requested measurements; write ``benchmark.json``, ``.md`` and ``.png``.

    Returns:
        ``machine``, ``settings``, ``contenders`` and ``left_out`` (descriptions and reasons, by
        model), one entry per measurement, and ``bar``, see ``hold_targets``.

    Raises:
        ConfigError: the configuration, device or survivors are wrong; before anything is measured.
        CheckpointError: weights cannot be read or do not fit; before anything is measured.
        DatasetError: the test set cannot be read; before anything is measured.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    is_segmenter = config.is_segmenter(read_config(options))
    results, chosen = (_open_segmenters if is_segmenter else _open_detectors)(options)
    for name, reason in results["left_out"].items():
        logger.info("Left out: %s, %s", name, reason)
    for name, measure in chosen.items():
        logger.info("Measuring: %s", name)
        results[name] = measure()
        results["bar"] = hold_targets(results)
        # After every measurement, so that an interruption loses none.
        write_json(results, options.output / "benchmark.json", indent=2)
        with atomic_path(options.output / "benchmark.md") as temporary:
            temporary.write_text(format_benchmark(results) + "\n", encoding="utf-8")
        plot_benchmark(results, options.output / "benchmark.png")
    return results


def _open_detectors(options: Options) -> tuple[Results, Measurements]:
    """Results without measurements yet, and these."""
    contenders = options.contenders
    if not contenders:
        raise ConfigError(
            f"--contenders: the model is a detector. Choose from {', '.join(MODELS)}."
        )
    if set(options.measure).isdisjoint(WITH_MODELS):
        # Nothing that is measured has the weights of the configuration.
        contenders = ()
        options = replace(options, opts=(*options.opts, "MODEL.WEIGHTS", ""))
    setup = Setup(options)
    setup.batches(options.batches[0])  # reads the test set now, so that errors come first
    setup_logging(options.output)
    models, left_out = open_models(setup, contenders)
    measured = _measurements(setup, models, left_out)
    results = {
        "machine": describe(setup.device),
        "settings": {
            **_settings(setup),
            "fast": setup.fast_arguments(),
            "exits": setup.exits[1],
            "autocast": options.autocast,
        },
        "contenders": {name: _described(name, setup) for name in models},
        "left_out": left_out,
    }
    return results, {name: measured[name] for name in options.measure}


def _open_segmenters(options: Options) -> tuple[Results, Measurements]:
    """As ``_open_detectors``."""
    chosen = [name for name in options.measure if name in OF_SEGMENTERS]
    if not chosen or not options.segmenters:
        what, known = ("contenders", SEGMENTERS) if chosen else ("measure", OF_SEGMENTERS)
        raise ConfigError(f"--{what}: the model is a segmenter. Choose from {', '.join(known)}.")
    setup = SegmenterSetup(options)
    setup.batches(options.batches[0])  # reads the test set now, so that errors come first
    setup_logging(options.output)
    models, left_out = open_segmenters(setup, options.segmenters)
    results = {
        "machine": describe(setup.device),
        "settings": _settings(setup),
        "contenders": {name: SEGMENTERS[name] for name in models},
        "left_out": left_out,
    }
    measured = measurements(setup, models)
    return results, {name: measured[name] for name in chosen}


def _described(name: str, setup: Setup) -> str:
    is_emulated = name.endswith("-autocast") and not has_bfloat16(setup.device)
    return MODELS[name] + (EMULATED if is_emulated else "")


def _measurements(
    setup: Setup, models: Models, left_out: dict[str, str]
) -> dict[str, Callable[[], Any]]:
    options = setup.options
    sizes = list(itertools.product(options.batches, options.proposals))
    in_memory = [name for name in _MEMORY_MODELS if name in models]
    return {
        "heads": lambda: [compare_heads(setup, models, *size) for size in sizes],
        "masks": lambda: _masks(setup, models, left_out),
        "whole": lambda: [compare_whole(setup, models, *size) for size in sizes],
        "parts": lambda: [compare_parts(setup, models, *sizes[0])],
        "training": lambda: _training(setup, left_out),
        "memory": lambda: compare_memory(options, in_memory, trainable(setup)[0], _TRAINING_IMAGES),
        "limits": lambda: measure_limits(setup, models),
        "tiles": lambda: measure_tiles(setup, models),
        "accuracy": lambda: _accuracy(setup, left_out),
        "attention": lambda: compare_attention(options),
        "backbones": lambda: measure_backbones(options, left_out),
        "waits": lambda: measure_waits(options, left_out),
    }


def _masks(setup: Setup, models: Models, left_out: dict[str, str]) -> list[Results]:
    if not setup.cfg.MODEL.MASK_ON:
        left_out["masks"] = "MODEL.MASK_ON is False"
        return []
    return [compare_masks(setup, models, images) for images in setup.options.batches]


def _training(setup: Setup, left_out: dict[str, str]) -> list[Results]:
    names, why_not = trainable(setup)
    left_out |= why_not
    steps = open_training_steps(setup, names, setup.training_batch(_TRAINING_IMAGES))
    return [compare_training(setup, steps, _TRAINING_IMAGES)] if steps else []


def _accuracy(setup: Setup, left_out: dict[str, str]) -> Results:
    if not setup.trained:
        left_out["accuracy"] = "MODEL.WEIGHTS is empty, and random weights detect nothing"
        return {}
    return measure_accuracy(setup.cfg, setup.options.output / "accuracy")


def _settings(setup: Setup | SegmenterSetup) -> Results:
    options = setup.options
    return {
        "config_file": list(options.config_file),
        "opts": list(options.opts),
        "weights": setup.cfg.MODEL.WEIGHTS or f"drawn, seed {options.seed}",
        "images": "of the test set" if setup.trained else "drawn",
        "size": None if setup.trained else list(options.size),
        "rounds": options.rounds,
        "warmup": options.warmup,
        "seconds": options.seconds or None,
    }
