"""Shadow runs: the full cascade on a sample of the images, and what exits lose there."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cascade_det.core.structures import DetectorOutput
from cascade_det.data.samples import Sample
from cascade_det.evaluation.agreement import MIN_SCORE, agreement_loss
from cascade_det.evaluation.evaluator import Evaluator
from cascade_det.evaluation.mean_bounds import mean_interval

logger = logging.getLogger(__name__)

# The promise is a measurement too: losses up to this many deviations above it are not drift.
_DEVIATIONS = 2.0


@dataclass(frozen=True)
class ShadowRules:
    """Which images take the full cascade too, and the loss that calibration promised.

    Attributes:
        share: of the images, in [0, 1].
        min_score: lowest score that counts, see ``agreement_loss``.
        seed: of the choice of images.
        expected_loss: mean ``agreement_loss`` in calibration; ``None`` without a promise.
        expected_deviation: standard deviation of that mean.
        confidence: of the intervals, in (0, 1).
    """

    share: float = 0.0
    min_score: float = MIN_SCORE
    seed: int = 0
    expected_loss: float | None = None
    expected_deviation: float = 0.0
    confidence: float = 0.95

    def place(self, key: object) -> float:
        """A hash in [0, 1) of ``key`` and the seed; images below ``share`` are chosen.

        So the choice does not depend on other images, and a larger share adds images.
        """
        digest = hashlib.blake2b(
            f"{self.seed}:{key}".encode("utf-8", "surrogatepass"), digest_size=6
        ).digest()
        return int.from_bytes(digest, "big") / 2.0**48

    def chooses(self, key: object) -> bool:
        """Whether the image with this key takes the full cascade."""
        return self.place(key) < self.share


def image_key(sample: Sample, number: int) -> object:
    """The identity of an image: its id, else its file name, else ``number``."""
    for name in ("image_id", "file_name"):
        if sample.get(name) is not None:
            return sample[name]
    return number


def shadow_metrics(losses: Sequence[float], rules: ShadowRules) -> dict[str, float]:
    """The metrics of shadow runs.

    Args:
        losses: of independent images, in an order that does not depend on them.
        rules: of the choice of images.

    Returns:
        ``images`` with a shadow run; ``loss``, their mean, from ``loss_low`` to ``loss_high``;
        ``changed``, the share of images with any loss, from ``changed_low`` to ``changed_high``;
        ``confidence`` of either interval, see ``mean_interval``. Without images the means are nan
        and the intervals [0, 1]. If a loss was promised, also ``expected_loss``,
        ``expected_deviation`` and ``drift``: 1 if ``loss_low`` is above the promise plus twice
        its deviation, else 0.
    """
    count, changed = len(losses), [float(loss > 0) for loss in losses]
    low, high = mean_interval(losses, confidence=rules.confidence)
    changed_low, changed_high = mean_interval(changed, confidence=rules.confidence)
    metrics = {
        "images": count,
        "loss": sum(losses) / count if count else float("nan"),
        "loss_low": low,
        "loss_high": high,
        "changed": sum(changed) / count if count else float("nan"),
        "changed_low": changed_low,
        "changed_high": changed_high,
        "confidence": rules.confidence,
    }
    if rules.expected_loss is not None:
        most = rules.expected_loss + _DEVIATIONS * rules.expected_deviation
        metrics["expected_loss"] = rules.expected_loss
        metrics["expected_deviation"] = rules.expected_deviation
        metrics["drift"] = int(low > most)
    return metrics


def watch_drift(shadow: Mapping[str, Any], drifted: bool) -> bool:
    """Log when drift begins or ends.

    Args:
        shadow: see ``shadow_metrics``.
        drifted: whether there was drift before.

    Returns:
        Whether there is drift now.
    """
    drifts = bool(shadow.get("drift"))
    if drifted and not drifts:
        logger.info("Drift has ended: exits lose %.4f per image.", shadow["loss"])
    elif drifts and not drifted:
        logger.warning(
            "Drift: exits lose %.4f of the full cascade's detections per image (%.4f to %.4f, "
            "from %d shadow images), where calibration promised %.4f with a deviation of %.4f. "
            "Calibrate on images like these, or switch exits off.",
            shadow["loss"],
            shadow["loss_low"],
            shadow["loss_high"],
            shadow["images"],
            shadow["expected_loss"],
            shadow["expected_deviation"],
        )
    return drifts


class ShadowEvaluator(Evaluator):
    """The agreement of a detector with its full cascade, on a sample of the images.

    Needs a detector that is run with ``stages=True``.

    Args:
        rules: the choice of images, and the promise.
    """

    def __init__(self, rules: ShadowRules) -> None:
        self._rules = rules
        self._drifted = False
        self.reset()

    def reset(self) -> None:
        """Discard everything that was processed."""
        self._num_images = 0
        self._losses: dict[object, float] = {}

    def process(self, batch: Sequence[Sample], output: DetectorOutput) -> None:
        """Add the chosen images of a batch.

        Raises:
            ValueError: the output has no stages.
        """
        if not output.stages:
            raise ValueError("no output per stage: run the detector with stages=True")
        full = output.stages[-1].detections
        for sample, early, late in zip(batch, output.detections, full, strict=True):
            key = image_key(sample, self._num_images)
            self._num_images += 1
            if self._rules.chooses(key):
                self._losses[key] = agreement_loss(early, late, min_score=self._rules.min_score)

    def state(self) -> dict[object, float]:
        """The losses by image."""
        return self._losses

    def merge(self, states: Sequence[dict[object, float]]) -> None:
        """Continue from the states of all processes."""
        self._losses = {key: loss for state in states for key, loss in state.items()}

    def evaluate(self) -> dict[str, Any]:
        """``{"shadow": {...}}``, see ``shadow_metrics``; warns of drift."""
        # By hash: the intervals need an order that is independent of the losses, and the same for
        # any number of processes.
        keys = sorted(self._losses, key=self._rules.place)
        shadow = shadow_metrics([self._losses[key] for key in keys], self._rules)
        self._drifted = watch_drift(shadow, self._drifted)
        return {"shadow": shadow}


def shadow_evaluators(*, share: float, **rules: Any) -> list[Evaluator]:
    """A ``ShadowEvaluator`` with these ``ShadowRules``; none if they choose no image."""
    return [ShadowEvaluator(ShadowRules(share=share, **rules))] if share > 0 else []
