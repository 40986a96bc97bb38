"""What to measure; checked before heavy imports."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cascade_det.errors import ConfigError

MODELS: dict[str, str] = {
    "ours": "standalone host, exits off, float32",
    "ours-fast": "standalone host after optimize(), exits off",
    "ours-fast-exits": "standalone host after optimize(), with exits",
    "plugin": "Detectron2's model with our heads, exits off, float32",
    "plugin-fast": "Detectron2's model with our heads, optimised, exits off",
    "plugin-fast-exits": "Detectron2's model with our heads, optimised, with exits",
    "detectron2-cascade": "Detectron2 with its CascadeROIHeads, as shipped",
    "detectron2-cascade-autocast": "the same under autocast",
    "detectron2-one-stage": "Detectron2 with its StandardROIHeads (Faster R-CNN), as shipped",
    "detectron2-one-stage-autocast": "the same under autocast",
    "torchvision": "torchvision's Faster R-CNN, R-50-FPN (one stage), as shipped",
}
MEASUREMENTS = ("heads", "whole", "parts", "training", "memory", "limits", "accuracy")
AUTOCAST_TYPES = ("bfloat16", "float16")

# Measured with exits "below 0.02, redundant from 0.95, REGION_BUDGET [300, 100, 50]".
RECORDED = (300.0, 100.0, 35.0)
RECORDED_FROM = "BCCD with ResNet-18 (AP 60.88, and 60.92 without exits)"


@dataclass(frozen=True)
class Survivors:
    """Regions per image that enter each stage of a trained model with exits.

    Attributes:
        per_stage: means over images, non-increasing.
        origin: where the numbers come from, for the report.
    """

    per_stage: tuple[float, ...]
    origin: str

    @property
    def budgets(self) -> list[int]:
        """The means rounded up, so that the work is never less than recorded; 1 or more."""
        return [max(1, math.ceil(count)) for count in self.per_stage]


@dataclass(frozen=True)
class Options:
    """The options of the command.

    Attributes:
        config_file: YAML files; later ones override earlier ones.
        opts: configuration keys and values that override the files.
        output: folder of the results.
        contenders: the models to compare, names from ``MODELS``.
        measure: names from ``MEASUREMENTS``.
        batches: batch sizes, in images.
        proposals: numbers of regions per image that reach the heads.
        size: (height, width) of random images in pixels.
        rounds: measured runs of each model.
        warmup: unmeasured runs of each model before them.
        seconds: a comparison starts no new round after this time; 0 for no limit.
        survivors: regions per stage that replayed exits keep; used without trained weights.
        device: of all models, "cpu", "cuda" or "cuda:<index>".
        threads: of the CPU; 0 for PyTorch's default.
        autocast: dtype of the baselines under autocast.
        emulated: whether to run baselines under autocast on a CPU that only emulates the dtype.
        images: number of different batches per comparison; used with trained weights.
        seed: of weights, images and regions.
    """

    config_file: tuple[str, ...]
    opts: tuple[str, ...] = ()
    output: Path = Path("output/benchmark")
    contenders: tuple[str, ...] = tuple(MODELS)
    measure: tuple[str, ...] = MEASUREMENTS
    batches: tuple[int, ...] = (1,)
    proposals: tuple[int, ...] = (1000, 300, 100)
    size: tuple[int, int] = (800, 1088)
    rounds: int = 7
    warmup: int = 1
    seconds: float = 0.0
    survivors: Survivors = field(default_factory=lambda: Survivors(RECORDED, RECORDED_FROM))
    device: str = "cpu"
    threads: int = 0
    autocast: str = "bfloat16"
    emulated: bool = True
    images: int = 4
    seed: int = 0

    def check(self) -> None:
        """Check all values.

        Raises:
            ConfigError: names an option, its value and the remedy.
        """
        _known("--contenders", self.contenders, tuple(MODELS))
        _known("--measure", self.measure, MEASUREMENTS)
        _known("--autocast", (self.autocast,), AUTOCAST_TYPES)
        for option, values, least in (
            ("--batch", self.batches, 1),
            ("--proposals", self.proposals, 1),
            ("--size", self.size, 32),
            ("--rounds", (self.rounds,), 1),
            ("--warmup", (self.warmup,), 0),
            ("--seconds", (self.seconds,), 0),
            ("--threads", (self.threads,), 0),
            ("--images", (self.images,), 1),
        ):
            if not values or min(values) < least:
                shown = " ".join(map(str, values))
                raise ConfigError(f"{option} is {shown!r}: give numbers of {least} or more.")
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise ConfigError(f"--device is {self.device!r}: give cpu, cuda or cuda:<index>.")


# Ends within two minutes on two threads of a CPU.
QUICK: dict[str, Any] = {
    "contenders": tuple(name for name in MODELS if name not in ("plugin", "plugin-fast")),
    "measure": ("heads", "whole", "parts"),
    "proposals": (1000,),
    "size": (384, 512),
    "rounds": 5,
    "seconds": 8.0,
    "emulated": False,
}


def read_survivors(values: Sequence[str]) -> Survivors:
    """Read survivors from numbers, or from the ``results.json`` of an evaluation with exits.

    Args:
        values: one number per stage, or a single path.

    Raises:
        ConfigError: the numbers are invalid or increase, or the file has none.
    """
    try:
        survivors = Survivors(tuple(float(value) for value in values), "--survivors")
    except ValueError:
        if len(values) > 1:
            raise ConfigError(
                f"--survivors {' '.join(values)!r}: give one number for each stage, such as "
                "300 100 35, or the results.json of an evaluation with exits."
            ) from None
        survivors = _from_results(Path(values[0]))
    counts = survivors.per_stage
    if not all(math.isfinite(count) and count >= 0 for count in counts) or counts[0] < 1:
        raise ConfigError(
            f"{survivors.origin}: {list(counts)} are not numbers of regions. Give means per image, "
            "1 or more for stage 0."
        )
    if any(later > earlier for earlier, later in itertools.pairwise(counts)):
        raise ConfigError(
            f"{survivors.origin}: {list(counts)} grow, but regions that exit do not come back. "
            "Give the numbers that enter stage 0, 1, ..."
        )
    return survivors


def _from_results(path: Path) -> Survivors:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--survivors {path}: neither numbers nor a readable results.json ({error})."
        ) from error
    found: list[float] = []
    try:
        exits = results["exits"]
        while not found or f"stage{len(found)}" in exits:
            found.append(float(exits[f"stage{len(found)}"]["entered_per_image"]))
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            f"--survivors {path}: has no exits/stage{len(found)}/entered_per_image. Give the "
            "results.json that tools/train_net.py --eval-only wrote for one data set, with exits "
            "on."
        ) from None
    return Survivors(tuple(found), str(path))


def _known(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    if not names:
        raise ConfigError(f"{option} is empty: give some of {', '.join(known)}.")
    for name in names:
        if name not in known:
            raise ConfigError(f"{option}: {name!r} is unknown. Give some of {', '.join(known)}.")
