"""The target of a calibration, and how thorough it is; checked before any work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cascade_det.calibration.risk_control import SampleTooSmallError, smallest_sample
from cascade_det.errors import ConfigError

MIN_IMAGES = 4  # Half of these is the smallest sample with a deviation.
QUALITY_DROP, FAST_DROP = 0.1, 1.0  # Percent points of AP, of the profiles.


@dataclass(frozen=True)
class Target:
    """The goal: one of the first four.

    Attributes:
        max_ap_drop: the most percent points of the metric below the full cascade, at the least
            work.
        latency_ms: milliseconds per image, at the highest AP.
        exit_rate: least share of the later stages' regions that are not computed, 0 to 1, at the
            highest AP.
        risk: bound on the mean share of the full cascade's true positives of an image that get
            lost, between 0 and 1, at the least work; holds with probability ``1 - delta``.
        delta: see ``risk``.
        metric: what counts: ``bbox/AP`` or ``segm/AP``; of segmenters ``sem_seg/mIoU`` or
            ``sem_seg/Dice``.
        loss: of detectors, whether the IoU of ``boxes`` or of ``masks`` says what is lost.

    Raises:
        ConfigError: not exactly one target, or a value out of range.
    """

    max_ap_drop: float | None = None
    latency_ms: float | None = None
    exit_rate: float | None = None
    risk: float | None = None
    delta: float = 0.1
    metric: str = "bbox/AP"
    loss: str = "boxes"

    def __post_init__(self) -> None:
        given = [name for name in _IN_RANGE if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"{len(given)} targets are given: give one of --max-ap-drop, --latency-ms, "
                "--exit-rate and --risk"
            )
        (name,) = given
        holds, wanted = _IN_RANGE[name]
        if not holds(value := getattr(self, name)):
            raise ConfigError(f"--{name.replace('_', '-')} is {value}: give {wanted}")
        if not 0 < self.delta < 1:
            raise ConfigError(f"--delta is {self.delta}: give a number between 0 and 1")

    @property
    def judged_drop(self) -> float:
        """Percent points of AP that the images have to judge, also for other targets."""
        return QUALITY_DROP if self.max_ap_drop is None else self.max_ap_drop

    @property
    def needs_masks(self) -> bool:
        """Whether it is about masks."""
        return self.metric == "segm/AP" or self.loss == "masks"

    def check_masks(self, has_masks: bool) -> None:
        """Check that a detector has the masks that the target needs.

        Raises:
            ConfigError: it has none.
        """
        if self.needs_masks and not has_masks:
            raise ConfigError(
                "--metric segm/AP and --loss masks need masks, and the cascade makes none: set "
                "MODEL.MASK_ON to True for a model that was trained with masks, or leave them out"
            )

    def check_images(self, num_images: int, unit: str = "images", *, halves: bool = False) -> None:
        """Check that there are enough images.

        Args:
            num_images: their number, or that of their volumes, which are independent.
            unit: what is counted.
            halves: whether one half of them chooses settings, and only the other half tests them.

        Raises:
            SampleTooSmallError: there are too few.
        """
        if num_images < MIN_IMAGES:
            raise SampleTooSmallError(
                f"Exits that some {unit} choose are judged by others: {num_images} are too few. "
                f"Use {MIN_IMAGES} or more, better some hundreds."
            )
        least = 0 if self.risk is None else smallest_sample(self.risk, self.delta)
        if num_images // (1 + halves) < least:
            to_choose = f" and as many to choose it, {2 * least} in all" if halves else ""
            raise SampleTooSmallError(
                f"--risk {self.risk} --delta {self.delta}: at least {least} {unit} are needed to "
                f"test a setting{to_choose}, but there are {num_images}. Add {unit}, or raise "
                "--risk or --delta."
            )


_IN_RANGE: dict[str, tuple[Callable[[float], bool], str]] = {
    "max_ap_drop": (lambda value: 0 <= value <= 100, "percent points from 0 to 100"),
    "latency_ms": (lambda value: 0 < value < float("inf"), "milliseconds above 0"),
    "exit_rate": (lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "risk": (lambda value: 0 < value < 1, "a number between 0 and 1"),
}


@dataclass(frozen=True)
class Options:
    """How thorough a calibration is.

    Attributes:
        images: limit of images to record.
        trials: limit of settings that a free search tries.
        score: lowest score of a detection that can be lost, 0 to 1.
        seed: of the split into folds or halves.
        timed_batches: batches to measure milliseconds on.
        rounds: how often each batch is run with each policy.

    Raises:
        ConfigError: a number is out of range.
    """

    images: int = 2000
    trials: int = 1000
    score: float = 0.5
    seed: int = 0
    timed_batches: int = 8
    rounds: int = 3

    def __post_init__(self) -> None:
        least = {"images": MIN_IMAGES, "trials": 1, "seed": 0, "timed_batches": 1, "rounds": 1}
        for name, number in least.items():
            if (value := getattr(self, name)) < number:
                raise ConfigError(f"--{name} is {value}: give {number} or more")
        if not 0 <= self.score <= 1:
            raise ConfigError(f"--score-threshold is {self.score}: give a number from 0 to 1")
