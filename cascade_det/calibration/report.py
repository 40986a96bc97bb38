"""The files of a calibration: YAML, tables and a plot, with measured milliseconds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cascade_det.calibration.assessment import CHOSEN, Assessment
from cascade_det.calibration.calibrator import Calibration
from cascade_det.calibration.comparison import ComparedExits, format_comparison, write_comparison
from cascade_det.calibration.exits_yaml import write_exits
from cascade_det.calibration.front import spread_out, write_front
from cascade_det.calibration.front_plot import plot_front
from cascade_det.calibration.mask_rules import format_mask_rules, write_mask_rules
from cascade_det.calibration.page import write_calibration_page
from cascade_det.calibration.profiles import PROMISES, kept_profiles
from cascade_det.calibration.target import Target
from cascade_det.files import write_json
from cascade_det.report.analysis_files import as_extra
from cascade_det.report.pages.page import REPORT_FILE
from cascade_det.report.text import describe_machine

logger = logging.getLogger(__name__)

# Points of the front that are measured, in addition to the profiles.
MOST_MEASURED = 8
# What a calibration leaves in its folder.
FILES = (
    "exits.yaml",
    *(f"{name}.yaml" for name in PROMISES),
    "front.csv",
    "front.png",
    "comparison.csv",
    "masks.csv",
    "calibration.json",
    REPORT_FILE,
)


def write_report(
    assessment: Assessment, target: Target, source: dict[str, Any], output_dir: Path
) -> dict[str, Any]:
    """Assess a calibration, log the comparison and write ``FILES``.

    Profiles that break their promise are left out.

    Returns:
        The content of ``calibration.json``.
    """
    calibrator, calibration = assessment.calibrator, assessment.calibration
    expected = assessment.expected()
    front = assessment.front()
    named = assessment.profiles(front)
    drawn = spread_out(front, MOST_MEASURED)
    measured = [*named.values(), *(point.setting for point in drawn)]
    milliseconds, of_masks = assessment.milliseconds(measured)
    rows = assessment.comparison(milliseconds, of_masks)
    logger.info("On the images that judge:\n\n%s\n", format_comparison(rows))
    points = {name: assessment.judged(setting, milliseconds) for name, setting in named.items()}
    again = [assessment.judged(point.setting, milliseconds) for point in front]
    profiles, left_out = kept_profiles(points, calibration.setting)
    device = "" if target.latency_ms is None else assessment.latency.device_name
    settings = {name: point.setting for name, point in profiles.items()}
    for name, setting in {"exits": calibration.setting, **settings}.items():
        write_exits(
            calibrator.cfg,
            setting,
            output_dir / f"{name}.yaml",
            loss=assessment.loss(setting),
            score=assessment.options.score,
            source=source,
            device=device if name == "exits" else "",
        )
    write_front(again, output_dir / "front.csv")
    write_comparison(rows, output_dir / "comparison.csv")
    if calibrator.has_masks:
        of_rules = assessment.mask_rules()
        logger.info("Fewer masks with these exits:\n\n%s\n", format_mask_rules(of_rules))
        write_mask_rules(of_rules, output_dir / "masks.csv")
    plot_front(
        again,
        output_dir / "front.png",
        profiles=profiles,
        tried=assessment.tried(),
        compared=rows,
        chosen=CHOSEN,
        metric=calibrator.metric,
    )
    _warn(calibration, target, rows)
    for name, reason in left_out.items():
        logger.info("No %s.yaml: %s", name, reason)
    detector = assessment.detector
    content = {
        "target": {name: x for name, x in asdict(target).items() if x is not None},
        "setting": calibration.setting,
        "expected": expected,
        "images": {
            "chosen_on": len(calibrator.trials.recording.image_ids),
            "reported_on": len(calibrator.others.recording.image_ids),
        },
        "profiles": {"written": [*profiles], "left_out": left_out},
        "search": "path" if calibrator.trials is calibrator.others else "free",
        "trials": len(calibrator.search.tried),
        "latency_model": asdict(assessment.latency),
        "machine": describe_machine(next(detector.parameters()).device, detector.dtype),
        **source,
    }
    write_json(content, output_dir / "calibration.json")
    with as_extra(output_dir / REPORT_FILE):
        write_calibration_page(output_dir)
    return content


def _warn(calibration: Calibration, target: Target, rows: Sequence[ComparedExits]) -> None:
    """Warn where the result misses the target."""
    change = calibration.differences[calibration.metric]
    if target.max_ap_drop is not None and calibration.drop > target.max_ap_drop:
        logger.warning(
            "On images that had no part in the choice, what is chosen loses %.2f points of %s "
            "(95 %%: %.2f to %.2f), not at most %g: calibrate on more images",
            -change.value,
            calibration.metric,
            -change.high,
            -change.low,
            target.max_ap_drop,
        )
    if not calibration.setting and (target.max_ap_drop, target.risk) != (None, None):
        logger.warning(
            "No setting is sure to reach the target: exits.yaml has no exits. Calibrate on more "
            "images, or ask for less."
        )
    rate = calibration.reported.exit_rate(calibration.full)
    if target.exit_rate is not None and rate < target.exit_rate:
        logger.warning(
            "On the images that judge, the setting skips %.4f of the later "
            "stages' regions, not %g. Ask for more.",
            rate,
            target.exit_rate,
        )
    measured = next(row.milliseconds for row in rows if row.name == CHOSEN)
    if target.latency_ms is not None and (measured or 0.0) > target.latency_ms:
        logger.warning(
            "The setting was measured at %.1f ms per image, more than the target of %g ms: the "
            "latency model is not exact. Ask for less.",
            measured,
            target.latency_ms,
        )
