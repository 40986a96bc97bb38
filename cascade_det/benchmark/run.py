"""All that a benchmark measures, one comparison after the other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from cascade_det.benchmark.accuracy import SETTINGS, measure_accuracy, settings_without_exits
from cascade_det.benchmark.bar import EMULATED, hold_claims
from cascade_det.benchmark.comparison import (
    compare_heads,
    compare_parts,
    compare_training,
    compare_whole,
)
from cascade_det.benchmark.contenders import Contender, open_contenders
from cascade_det.benchmark.limits import measure_limits
from cascade_det.benchmark.machine import describe
from cascade_det.benchmark.memory_comparison import compare_memory
from cascade_det.benchmark.options import CONTENDERS, Options
from cascade_det.benchmark.picture import plot_benchmark
from cascade_det.benchmark.report import format_benchmark
from cascade_det.benchmark.setup import Setup
from cascade_det.benchmark.training import open_training_steps, trainable
from cascade_det.engine.devices import has_bfloat16
from cascade_det.files import atomic_path, write_json

logger = logging.getLogger(__name__)

RESULTS_FILE = "benchmark.json"
TABLES_FILE = "benchmark.md"
PICTURE_FILE = "benchmark.png"
_TRAINING_IMAGES = 2
# Of which peak memory is looked at: each takes a process of its own.
_WEIGHED = ("ours", "ours-fast", "ours-fast-exits", "detectron2-cascade")

Results = dict[str, Any]


def run(options: Options) -> Results:
    """Measure everything that is asked for, and write ``benchmark.json``, ``.md`` and ``.png``.

    Returns:
        ``machine``, ``settings``, ``contenders`` and ``left_out`` (a word on each by name), one
        entry for each measurement, and ``bar``, see ``bar.hold_claims``.

    Raises:
        ConfigError: options or configuration cannot be met; before anything is measured.
        CheckpointError: likewise, of weights.
        DatasetError: likewise, of a test set.
    """
    options.check()
    if options.threads:
        torch.set_num_threads(options.threads)
    setup = Setup(options)
    setup.batches(options.batches[0])  # a test set that is missing is told of now
    opened, left_out = open_contenders(setup, options.contenders)
    for name, reason in left_out.items():
        logger.info("Left out: %s, %s", name, reason)
    results: Results = {
        "machine": describe(setup.device),
        "settings": _settings(setup),
        "contenders": {name: _described(name, setup) for name in opened},
        "left_out": left_out,
    }
    for name in options.measure:
        logger.info("Measuring: %s", name)
        results[name] = _MEASURES[name](setup, opened, left_out)
        results["bar"] = hold_claims(results)
        # Each time: what was measured is not lost if the rest is interrupted.
        write_json(results, options.output / RESULTS_FILE, indent=2)
        with atomic_path(options.output / TABLES_FILE) as temporary:
            temporary.write_text(format_benchmark(results) + "\n", encoding="utf-8")
        plot_benchmark(results, options.output / PICTURE_FILE)
    return results


def _described(name: str, setup: Setup) -> str:
    is_emulated = name.endswith("-autocast") and not has_bfloat16(setup.device)
    return CONTENDERS[name] + (EMULATED if is_emulated else "")


def _heads(setup: Setup, opened: Mapping[str, Contender], _: dict[str, str]) -> list[Results]:
    return [compare_heads(setup, opened, *size) for size in _sizes(setup.options)]


def _whole(setup: Setup, opened: Mapping[str, Contender], _: dict[str, str]) -> list[Results]:
    return [compare_whole(setup, opened, *size) for size in _sizes(setup.options)]


def _parts(setup: Setup, opened: Mapping[str, Contender], _: dict[str, str]) -> list[Results]:
    return [compare_parts(setup, opened, *_sizes(setup.options)[0])]


def _training(setup: Setup, _: Mapping[str, Contender], left_out: dict[str, str]) -> list[Results]:
    names, why_not = trainable(setup)
    left_out |= why_not
    steps = open_training_steps(setup, names, setup.training_batch(_TRAINING_IMAGES))
    return [compare_training(setup, steps, _TRAINING_IMAGES)] if steps else []


def _memory(setup: Setup, opened: Mapping[str, Contender], _: dict[str, str]) -> Results:
    names = [name for name in _WEIGHED if name in opened]
    return compare_memory(setup.options, names, trainable(setup)[0], _TRAINING_IMAGES)


def _limits(setup: Setup, opened: Mapping[str, Contender], _: dict[str, str]) -> Results:
    return measure_limits(setup, opened)


def _accuracy(setup: Setup, _: Mapping[str, Contender], left_out: dict[str, str]) -> Results:
    if not setup.trained:
        left_out["accuracy"] = "MODEL.WEIGHTS is empty, and drawn weights detect nothing"
        return {}
    # Exits at values that nobody chose are none of those that were timed.
    settings = SETTINGS if setup.exits[0] is not None else settings_without_exits()
    return measure_accuracy(setup.cfg, setup.options.output / "accuracy", settings=settings)


_MEASURES: dict[str, Callable[[Setup, Mapping[str, Contender], dict[str, str]], Any]] = {
    "heads": _heads,
    "whole": _whole,
    "parts": _parts,
    "training": _training,
    "memory": _memory,
    "limits": _limits,
    "accuracy": _accuracy,
}


def _sizes(options: Options) -> list[tuple[int, int]]:
    return [(batch, count) for batch in options.batches for count in options.proposals]


def _settings(setup: Setup) -> Results:
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
        "fast": setup.fast_arguments(),
        "exits": setup.exits[1],
        "autocast": options.autocast,
    }
