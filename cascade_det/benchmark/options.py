"""What is to be measured, checked before anything heavy is imported."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cascade_det.errors import ConfigError

CONTENDERS: dict[str, str] = {
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

# From the README's table of exits: blood cells (BCCD), ResNet-18, exits "below 0.02, redundant from
# 0.95, REGION_BUDGET [300, 100, 50]", AP 60.88 where the full cascade has 60.92.
RECORDED = (300.0, 100.0, 35.0)
RECORDED_FROM = "the README's table of exits (BCCD, R-18, AP 60.88 against 60.92 without exits)"


@dataclass(frozen=True)
class Survivors:
    """Regions of an image that enter each stage, as a trained model with exits had them.

    Attributes:
        per_stage: means over images; never rising.
        origin: where they come from, for the report.
    """

    per_stage: tuple[float, ...]
    origin: str

    @property
    def budgets(self) -> list[int]:
        """The same as whole numbers, never less work than was recorded."""
        return [max(1, math.ceil(count)) for count in self.per_stage]


@dataclass(frozen=True)
class Options:
    """Everything that a user can choose; checked by ``check``.

    Attributes:
        config_file: YAML files, later ones on top.
        opts: configuration keys and values that override them.
        output: folder of the results.
        contenders: names out of ``CONTENDERS``.
        measure: names out of ``MEASUREMENTS``.
        batches: images of a batch.
        proposals: regions of an image that reach the heads.
        size: (height, width) of drawn images in pixels.
        rounds: measured runs of each contender.
        warmup: runs of each contender before them.
        seconds: after so long a comparison begins no further round; 0 for no limit.
        survivors: what exits are replayed from, where weights are not trained.
        device: of all contenders, "cpu" or "cuda".
        threads: of the CPU; 0 for as many as PyTorch takes.
        autocast: type of the peers under autocast.
        emulated: whether to run peers under autocast where the CPU only emulates its type.
        images: different batches that a comparison goes through, where weights are trained.
        seed: of weights, images and regions.
    """

    config_file: tuple[str, ...]
    opts: tuple[str, ...] = ()
    output: Path = Path("output/benchmark")
    contenders: tuple[str, ...] = tuple(CONTENDERS)
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
        """Make sure that the values make sense.

        Raises:
            ConfigError: names an option, its value and the remedy.
        """
        _known("--contenders", self.contenders, tuple(CONTENDERS))
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
        for file in self.config_file:
            if not Path(file).is_file():
                raise ConfigError(f"--config-file {file}: there is no such file.")
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise ConfigError(f"--device is {self.device!r}: give cpu, cuda or cuda:<index>.")


# What ends within two minutes on two threads of a CPU. No further round begins after ``seconds``.
QUICK: dict[str, Any] = {
    "contenders": tuple(name for name in CONTENDERS if name not in ("plugin", "plugin-fast")),
    "measure": ("heads", "whole", "parts"),
    "proposals": (1000,),
    "size": (384, 512),
    "rounds": 5,
    "seconds": 8.0,
    "emulated": False,
}


def read_survivors(values: Sequence[str]) -> Survivors:
    """Survivors from numbers, or from the ``results.json`` of an evaluation with exits.

    Args:
        values: one number for each stage, or the path of the file alone.

    Raises:
        ConfigError: they are no numbers above 0, they rise, or the file has none.
    """
    if len(values) == 1 and not _is_number(values[0]):
        survivors = _from_results(Path(values[0]))
    else:
        try:
            per_stage = tuple(float(value) for value in values)
        except ValueError:
            shown = " ".join(values)
            raise ConfigError(
                f"--survivors {shown!r}: give one number for each stage, such as 300 100 35, or "
                "the results.json of an evaluation with exits."
            ) from None
        survivors = Survivors(per_stage, "--survivors")
    counts = survivors.per_stage
    if not all(math.isfinite(count) and count >= 0 for count in counts) or counts[0] < 1:
        raise ConfigError(
            f"{survivors.origin}: {list(counts)} are no numbers of regions. Give means per image, "
            "1 or more for stage 0."
        )
    if any(later > earlier for earlier, later in itertools.pairwise(counts)):
        raise ConfigError(
            f"{survivors.origin}: {list(counts)} grow, but no region comes back once it has left. "
            "Give what enters stage 0, 1, ..."
        )
    return survivors


def _from_results(path: Path) -> Survivors:
    try:
        results: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--survivors {path}: neither numbers nor a results.json that can be read ({error})."
        ) from error
    exits = results.get("exits") if isinstance(results, dict) else None
    stages = exits if isinstance(exits, dict) else {}
    found: list[float] = []
    while isinstance(stage := stages.get(f"stage{len(found)}"), dict):
        count = stage.get("entered_per_image")
        if not isinstance(count, int | float):
            break
        found.append(float(count))
    if not found:
        raise ConfigError(
            f"--survivors {path}: has no exits/stage0/entered_per_image. Give the results.json "
            "that tools/train_net.py --eval-only wrote for one data set, with exits on."
        )
    return Survivors(tuple(found), str(path))


def _known(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    if not names:
        raise ConfigError(f"{option} is empty: give some of {', '.join(known)}.")
    for name in names:
        if name not in known:
            raise ConfigError(f"{option}: {name!r} is unknown. Give some of {', '.join(known)}.")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
