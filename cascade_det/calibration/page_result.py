"""The target and the result of a calibration, as a section of its page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cascade_det.calibration.assessment import CHOSEN
from cascade_det.report.pages.page import Grid, Preformatted, Section, number

_SHARES = frozenset(
    (
        *("exit_rate", "regions_left", "work", "loss", "loss_deviation", "lost_true_positives"),
        *("calibration_error_before", "calibration_error", "later levels computed"),
        *("decoder share", "model share", "right pixels lost", "tiles_open", "tiles_computed"),
    )
)

Row = Mapping[str, str]


def result_section(record: Mapping[str, Any], rows: Sequence[Row], exits_yaml: str) -> Section:
    """The target, whether images that had no part in the choice keep it, and what to expect.

    Args:
        record: the content of ``calibration.json``.
        rows: of ``comparison.csv``.
        exits_yaml: the content of ``exits.yaml``.
    """
    section = Section("result", "Target and result")
    expected = record["expected"]
    section.blocks += [f"Target: {_target(record['target'])}.", _method(record)]
    if not record["setting"]:
        section.blocks.append("No setting reaches the target: exits.yaml has no exits.")
    else:
        section.blocks.append(_verdict(record["target"], expected, rows))
    section.blocks.append(Grid("What to expect", ("", "value"), list(_expected(expected))))
    section.blocks.append(Preformatted("exits.yaml", exits_yaml))
    if profiles := record.get("profiles"):
        kept = ", ".join(f"{name}.yaml" for name in profiles["written"]) or "none"
        reasons = "\n".join(f"No {n}.yaml: {why}." for n, why in profiles["left_out"].items())
        section.blocks.append(f"Profiles that keep their promise: {kept}.\n{reasons}".rstrip())
    if off := record["setting"].get("GATES_OFF"):
        gates = ", ".join(map(str, off))
        section.blocks.append(f"Gates that would cost more than they save are off: {gates}.")
    return section


def _target(target: Mapping[str, Any]) -> str:
    metric = target["metric"]
    if "max_ap_drop" in target:
        return f"the least work that loses at most {target['max_ap_drop']:g} points of {metric}"
    if "latency_ms" in target:
        return f"the highest {metric} within {target['latency_ms']:g} ms per image"
    if "exit_rate" in target:
        share = 100 * target["exit_rate"]
        return f"the highest {metric} that skips {share:g} % of the later stages' work"
    return (
        f"the least work that loses at most {100 * target['risk']:g} % of what the full cascade "
        f"finds, with probability {1 - target['delta']:g}"
    )


def _method(record: Mapping[str, Any]) -> str:
    chosen_on, reported_on = (record["images"][key] for key in ("chosen_on", "reported_on"))
    if record.get("search") == "path":
        return (
            f"All {chosen_on:,} images choose one of {record['trials']:,} settings on a path from "
            "safe to risky exits. Changes of AP are cross-fitted: each fifth of the images has the "
            "setting that the others choose."
        )
    return (
        f"{record['trials']:,} settings were tried on {chosen_on:,} images. All numbers below are "
        f"of the other {reported_on:,}, unless they say otherwise."
    )


def _verdict(target: Mapping[str, Any], expected: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Whether the images that chose nothing agree with the target."""
    if "max_ap_drop" in target:
        masks = target["metric"] == "segm/AP"
        # Of a segmenter the name is that of a column.
        change = expected.get("change", expected.get("segm/AP_change" if masks else "AP_change"))
        kept, found = -change <= target["max_ap_drop"], f"the change is {change:+.2f} points"
    elif "exit_rate" in target:
        computed = expected.get("later levels computed")
        rate = expected["exit_rate"] if computed is None else 1 - computed
        kept, found = rate >= target["exit_rate"], f"{100 * rate:.1f} % is skipped"
    elif "latency_ms" in target:
        chosen = next(r for r in rows if r.get("exits") == CHOSEN or r.get("chosen") == "1")
        time = as_float(chosen.get("ms/image", chosen.get("model ms/image", "")))
        kept, found = time <= target["latency_ms"], f"{time:.1f} ms were measured"
    else:
        lost = expected.get("right pixels lost", expected.get("lost_true_positives"))
        kept, found = lost <= target["risk"], f"{100 * lost:.2f} % is lost"
    return f"On the images that judge, {found}: the target is {'kept' if kept else 'missed'}."


def _expected(expected: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each metric with its interval in one row."""
    for name, value in expected.items():
        if name == "chosen" or name.endswith((" low", " high", "_low", "_high")):
            continue
        text = _expected_number(name, value)
        ends = [expected.get(f"{name}{mark}{end}") for mark in "_ " for end in ("low", "high")]
        given = [_expected_number(name, end) for end in ends if end is not None]
        yield name.replace("_", " "), f"{text} [{', '.join(given)}]" if given else text


def _expected_number(name: str, value: Any) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return number(value)
    if name in _SHARES:
        return f"{100 * value:.2f} %"
    return f"{value:{'+' if name.endswith('change') else ''}.3f}"


def as_float(text: str) -> float:
    """A number of a table; nan for an empty cell."""
    return float(text) if text else math.nan
