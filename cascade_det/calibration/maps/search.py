"""Searches exits of maps on records of the whole decoder."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cascade_det.calibration.maps.record import MapRecord, replay
from cascade_det.calibration.maps.scores import Scorer
from cascade_det.calibration.risk_control import pareto_front
from cascade_det.errors import DatasetError
from cascade_det.segmentation.map_confidence import MEASURES
from cascade_det.segmentation.map_exits import KINDS

Setting = dict[str, Any]
NEVER = 1.1
# Shares of the patches or images that a threshold lets leave, if none left before.
_SHARES = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
# Percent points of the metric: for each, the cheapest setting that loses no more is run.
_DROPS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 1.0, 2.0, 4.0)


class MapTrial(NamedTuple):
    """A setting on the recorded images.

    Attributes:
        setting: ``kind``, ``confidence`` and ``thresholds``.
        drop: percent points of the metric below the whole decoder.
        work: share of the whole decoder's milliseconds, each level's times its computed share.
    """

    setting: Setting
    drop: float
    work: float


def try_settings(
    records: Sequence[MapRecord],
    scorer: Scorer,
    milliseconds: Sequence[float],
    *,
    num_classes: int,
    ignore_label: int,
    most_trials: int,
    seed: int,
    on_trial: Callable[[], object] = lambda: None,
) -> list[MapTrial]:
    """Replay settings of both kinds and all measures of confidence.

    Args:
        records: of I images.
        scorer: of their counts.
        milliseconds: of each level of the whole decoder.
        num_classes: K.
        ignore_label: truth of pixels that do not count.
        most_trials: limit.
        seed: of the settings that are tried if there are more.
        on_trial: called after each.

    Raises:
        DatasetError: the images have no class that the metric counts.
    """
    share = np.asarray(milliseconds) / sum(milliseconds)

    def run(setting: Setting | None) -> tuple[float, float]:
        found = [replay(record, setting, num_classes, ignore_label) for record in records]
        computed = np.mean([one.computed for one in found], axis=0)
        return scorer.score(np.stack([one.counts for one in found])), float(computed @ share)

    full, _ = run(None)
    if math.isnan(full):
        raise DatasetError(
            f"the {len(records)} images that choose have no pixels of the classes that "
            f"{scorer.metric} counts: use images with labels of them"
        )
    trials = []
    for setting in settings(records, most_trials, seed):
        score, work = run(setting)
        trials.append(MapTrial(setting, full - score, work))
        on_trial()
    return trials


def settings(records: Sequence[MapRecord], most: int, seed: int) -> Iterator[Setting]:
    """Thresholds per level out of quantiles of the recorded confidences; drawn if too many."""
    found: list[Setting] = []
    for kind, measure in itertools.product(KINDS, MEASURES):
        confidence = np.concatenate([r.confidence[kind, measure] for r in records], axis=1)
        candidates = [[NEVER, *_quantiles(of_level)] for of_level in confidence]
        found += [
            {"kind": kind, "confidence": measure, "thresholds": list(thresholds)}
            for thresholds in itertools.product(*candidates)
            if min(thresholds) < NEVER
        ]
    order = np.random.default_rng(seed).permutation(len(found))[:most]
    return (found[index] for index in sorted(order))


def _quantiles(confidence: Any) -> list[float]:
    finite = confidence[np.isfinite(confidence)]
    values = np.quantile(finite, [1 - share for share in _SHARES]) if len(finite) else []
    return sorted({float(f"{value:.6g}") for value in values})


def worth_running(trials: Sequence[MapTrial]) -> list[Setting]:
    """Of each kind, the cheapest settings up to some drops of the metric, without repetition."""
    chosen: list[Setting] = []
    for kind in KINDS:
        own = [trial for trial in trials if trial.setting["kind"] == kind]
        if not own:
            continue
        front = pareto_front([t.drop for t in own], [t.work for t in own])
        for most in _DROPS:
            good = [own[index] for index in front if own[index].drop <= most]
            cheapest = min(good, key=lambda trial: trial.work, default=None)
            if cheapest is not None and cheapest.work < 1 and cheapest.setting not in chosen:
                chosen.append(cheapest.setting)
    return chosen
