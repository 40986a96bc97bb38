"""What rules of masks leave out: fewer masks, less time, and the AP of masks that is left."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import tabulate

from cascade_det.calibration.latency_model import LatencyModel
from cascade_det.calibration.trials import ExitTrials, Policies
from cascade_det.core import MaskRules
from cascade_det.files import write_csv

SCORE_THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
REDUNDANCIES = (0.9, 0.7, 0.5)


@dataclass(frozen=True)
class MaskRulesRow:
    """Rules of masks, on the same detections.

    Attributes:
        rules: which detections get a mask.
        masks: per image.
        ap: of masks, in percent; a detection without a mask is not counted as one. ``None`` where
            no object has a mask to compare with.
        gigaflops: of the box and mask heads, per image, in 10^9 multiply-adds.
        milliseconds: per image, by the latency model.
    """

    rules: MaskRules
    masks: float
    ap: float | None
    gigaflops: float
    milliseconds: float


def try_mask_rules(
    trials: ExitTrials, policy: Policies, latency: LatencyModel
) -> list[MaskRulesRow]:
    """Try no rule, then each rule alone at some values.

    Args:
        trials: of a cascade with masks.
        policy: the exits.
        latency: predicts milliseconds.
    """
    tried = [
        MaskRules(),
        *(MaskRules(score_threshold=score) for score in SCORE_THRESHOLDS),
        *(MaskRules(redundancy_iou=iou) for iou in REDUNDANCIES),
    ]
    rows = []
    for rules in tried:
        trial = trials.replay(policy, rules)
        row = MaskRulesRow(
            rules=rules,
            masks=float(trial.masks.mean()),
            ap=trial.metrics.get("segm/AP"),
            gigaflops=trials.gigaflops(trial),
            milliseconds=latency.per_image(trial.entered, trial.masks, trial.tiles),
        )
        rows.append(row)
    return rows


def format_mask_rules(rows: Sequence[MaskRulesRow]) -> str:
    """The rows as plain text."""
    cells = [
        {
            "MODEL.CASCADE.MASK": _name(row.rules),
            "masks/image": f"{row.masks:.1f}",
            "segm AP": "" if row.ap is None else f"{row.ap:.2f}",
            "head GFLOPs": f"{row.gigaflops:.3f}",
            "ms/image (predicted)": f"{row.milliseconds:.1f}",
        }
        for row in rows
    ]
    aligned = ("left", *["right"] * 4)
    return tabulate(cells, headers="keys", colalign=aligned, disable_numparse=True)


def write_mask_rules(rows: Sequence[MaskRulesRow], path: str | os.PathLike[str]) -> None:
    """Write the rows as CSV; an old file is replaced in one step."""
    columns = [
        {
            "SCORE_THRESHOLD": row.rules.score_threshold,
            "REDUNDANCY": row.rules.redundancy_iou,
            "masks/image": row.masks,
            "segm/AP (%)": row.ap,
            "head GFLOPs/image": row.gigaflops,
            "ms/image (predicted)": row.milliseconds,
        }
        for row in rows
    ]
    write_csv(path, list(columns[0]), [list(row.values()) for row in columns])


def _name(rules: MaskRules) -> str:
    if rules.redundancy_iou is not None:
        return f"REDUNDANCY {rules.redundancy_iou}"
    return f"SCORE_THRESHOLD {rules.score_threshold}" if rules.score_threshold else "all masks"
