"""Plain-Python exit rules, region by region, to test the real ones against.

They share no code with ``cascade_det``; the outputs of learned parts are passed in.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Seen:
    """The input of the rules for one region; no ``probs`` and ``before`` before stage 0."""

    image: int
    box: tuple[float, float, float, float]
    objectness: float = 0.0
    before: tuple[float, float, float, float] | None = None
    probs: list[float] | None = None
    agreements: int = 0
    predicted_iou: float | None = None
    crop: list[float] | None = None

    @property
    def score(self):
        return sigmoid(self.objectness) if self.probs is None else max(self.probs[:-1])

    @property
    def label(self):
        return self.probs.index(self.score)

    @property
    def is_foreground(self):
        return self.score >= self.probs[-1]


@dataclass
class NaivePolicy:
    """Arguments as those of the real policy; tuples per stage or per gate, or empty for never.

    ``pruner`` and ``gate`` map a stage and its regions to a list of outputs. ``closest`` is the
    smallest distance of any value to its threshold so far.
    """

    thresholds: tuple[float, ...] = ()
    confidence: str = "max_prob"
    localisation: str = "none"
    localisation_thresholds: tuple[float, ...] = ()
    prune_thresholds: tuple[float, ...] = ()
    proposal_threshold: float = 0.0
    prune_margins: tuple[float, ...] = ()
    prune_best: int = 100
    pruner_thresholds: tuple[float, ...] = ()
    redundancy_iou: float | None = None
    region_budget: tuple[int, ...] = ()
    score_scales: tuple[float, ...] = ()
    score_shifts: tuple[float, ...] = ()
    pruner: Callable[[int, list[Seen]], list[float]] | None = None
    gate: Callable[[int, list[Seen]], list[float]] | None = None
    closest: float = field(default=math.inf)

    def decide(self, stage, regions, accepted=()):
        """The exit reason of each region, ``None`` if it stays."""
        reasons = [None] * len(regions)
        for rule in (
            self._below,
            self._far_from_best,
            self._pruned,
            self._covered,
            self._confident,
            self._over_budget,
        ):
            live = [i for i, reason in enumerate(reasons) if reason is None]
            found = rule(stage, [regions[i] for i in live], accepted)
            for i, reason in zip(live, found, strict=True):
                reasons[i] = reason
        return reasons

    def reported(self, probs, stage):
        """Class probabilities after calibration."""
        if not self.score_scales:
            return probs
        foreground = []
        for p in probs[:-1]:
            p = min(max(p, 1e-6), 1 - 1e-6)
            foreground.append(
                sigmoid(self.score_scales[stage] * math.log(p / (1 - p)) + self.score_shifts[stage])
            )
        return [*foreground, probs[-1]]

    def _is_below(self, value, threshold):
        if not isinstance(value, int):  # stages that agree are counted exactly
            self.closest = min(self.closest, abs(value - threshold))
        return value < threshold

    def _below(self, stage, regions, _):
        threshold = self.proposal_threshold
        if stage >= 0:
            threshold = self.prune_thresholds[stage] if self.prune_thresholds else 0.0
        return [
            "background" if threshold > 0 and self._is_below(r.score, threshold) else None
            for r in regions
        ]

    def _far_from_best(self, stage, regions, _):
        if not self.prune_margins or self.prune_margins[stage + 1] >= 1:
            return [None] * len(regions)
        reasons = []
        for region in regions:
            scores = sorted((r.score for r in regions if r.image == region.image), reverse=True)
            far = False
            if len(scores) >= self.prune_best:
                least = scores[self.prune_best - 1] - self.prune_margins[stage + 1]
                far = self._is_below(region.score, least)
            reasons.append("background" if far else None)
        return reasons

    def _pruned(self, stage, regions, _):
        if not self.pruner_thresholds or not self.pruner_thresholds[stage + 1] or not regions:
            return [None] * len(regions)
        threshold = self.pruner_thresholds[stage + 1]
        answers = self.pruner(stage, regions)
        return ["background" if self._is_below(a, threshold) else None for a in answers]

    def _covered(self, stage, regions, accepted):
        if self.redundancy_iou is None or stage < 0:
            return [None] * len(regions)
        candidates = [*regions, *accepted]
        order = sorted(range(len(candidates)), key=lambda i: -candidates[i].score)
        kept, covered = [], set()
        for i in order:
            region = candidates[i]
            overlaps = [
                iou(region.box, other.box)
                for other in kept
                if (other.image, other.label) == (region.image, region.label)
            ]
            if any([not self._is_below(overlap, self.redundancy_iou) for overlap in overlaps]):
                covered.add(i)
            else:
                kept.append(region)
        return ["redundant" if i in covered else None for i in range(len(regions))]

    def _confident(self, stage, regions, _):
        if not self.thresholds or stage < 0:
            return [None] * len(regions)
        if self.confidence == "learned":
            values = self.gate(stage, regions) if regions else []
        else:
            values = [CONFIDENCES[self.confidence](r) for r in regions]
        reasons = []
        for region, value in zip(regions, values, strict=True):
            ready = not self._is_below(value, self.thresholds[stage])
            if ready and self.localisation != "none":
                fit = (
                    iou(region.box, region.before)
                    if self.localisation == "refinement"
                    else region.predicted_iou
                )
                ready = not self._is_below(fit, self.localisation_thresholds[stage])
            reasons.append("confident" if ready else None)
        return reasons

    def _over_budget(self, stage, regions, _):
        if not self.region_budget or self.region_budget[stage + 1] == 0:
            return [None] * len(regions)
        reasons = []
        for i, region in enumerate(regions):
            better = [
                r
                for j, r in enumerate(regions)
                if r.image == region.image
                and (r.score > region.score or (r.score == region.score and j < i))
            ]
            over = len(better) >= self.region_budget[stage + 1]
            reasons.append("budget" if over else None)
        return reasons


def entropy(region):
    total = -sum(p * math.log(p) for p in region.probs if p > 0)
    return 1 - total / math.log(len(region.probs)) if region.is_foreground else 0.0


def margin(region):
    first, second, *_ = sorted(region.probs, reverse=True)
    return first - second if region.is_foreground else 0.0


def agreement(region):
    return region.agreements if region.is_foreground else 0


CONFIDENCES = {
    "max_prob": lambda region: region.score,
    "entropy": entropy,
    "margin": margin,
    "agreement": agreement,
}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    total = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / total
