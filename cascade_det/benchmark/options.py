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
    "torchvision": "torchvision's Faster R-CNN or Mask R-CNN, R-50-FPN (one stage), as shipped",
}
# Of a configuration of a segmenter.
SEGMENTERS: dict[str, str] = {
    "ours": "the segmenter in the standalone host, exits off, float32",
    "ours-fast": "the same after optimize_segmenter(), exits off",
    "ours-fast-exits": "the same after optimize_segmenter(), with the exits of the configuration",
    "torchvision-fcn": "torchvision's FCN with ResNet-50, as shipped",
    "torchvision-deeplabv3": "torchvision's DeepLabV3 with ResNet-50, as shipped",
    "torchvision-lraspp": "torchvision's LR-ASPP with MobileNetV3-Large, as shipped",
    "detectron2-fpn": "Detectron2's SemSegFPNHead on the backbone of ours, as shipped",
}
# The others are only measured if they are named; but for ``tiles``, they have models of their own.
OF_MODELS = ("heads", "masks", "whole", "parts", "training", "memory", "limits", "accuracy")
WITH_MODELS = (*OF_MODELS, "tiles")
MEASUREMENTS = (*WITH_MODELS, "attention", "backbones", "waits")
OF_SEGMENTERS = ("whole", "parts")
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
        contenders: the detectors to compare, names from ``MODELS``.
        segmenters: the segmenters to compare, names from ``SEGMENTERS``.
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
    segmenters: tuple[str, ...] = tuple(SEGMENTERS)
    measure: tuple[str, ...] = OF_MODELS
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
    origin = "--survivors"
    try:
        counts = tuple(float(value) for value in values)
    except ValueError:
        if len(values) > 1:
            raise ConfigError(
                f"--survivors {' '.join(values)!r}: give one number for each stage, such as "
                "300 100 35, or the results.json of an evaluation with exits."
            ) from None
        origin = values[0]
        counts = _entered_per_image(Path(origin))
    # Written so that nan fails as well.
    if not (1 <= counts[0] < math.inf and all(0 <= b <= a for a, b in itertools.pairwise(counts))):
        raise ConfigError(
            f"{origin}: {list(counts)} are not numbers of regions that enter stage 0, 1, ... Give "
            "means per image, 1 or more for stage 0, that do not grow: regions that exit do not "
            "come back."
        )
    return Survivors(counts, origin)


def _entered_per_image(path: Path) -> tuple[float, ...]:
    found: list[float] = []
    try:
        exits = json.loads(path.read_text(encoding="utf-8"))["exits"]
        while not found or f"stage{len(found)}" in exits:
            found.append(float(exits[f"stage{len(found)}"]["entered_per_image"]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"--survivors {path}: neither numbers nor a results.json with "
            f"exits/stage{len(found)}/entered_per_image, as cascade-det eval writes "
            f"for one data set, with exits on ({type(error).__name__}: {error})."
        ) from error
    return tuple(found)
