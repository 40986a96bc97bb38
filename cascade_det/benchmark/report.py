"""The results of a benchmark as tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cascade_det.benchmark.accuracy import accuracy_section
from cascade_det.benchmark.limits import limits_section
from cascade_det.benchmark.memory_comparison import memory_sections
from cascade_det.report.tables import Metrics, table

_STAGE_ORDER = ("preprocess", "backbone", "rpn")
_TITLES = {
    "heads": "RoI heads alone",
    "whole": "Whole model",
    "training": "Step of training",
}


def format_benchmark(results: Metrics) -> str:
    """All tables of the results, as far as they were measured."""
    sections = [_settings_section(results), _contender_section(results)]
    for measurement, title in _TITLES.items():
        for comparison in results.get(measurement, ()):
            sections += _comparison_sections(title, comparison)
    sections += [_parts_section(comparison) for comparison in results.get("parts", ())]
    if results.get("memory"):
        sections += memory_sections(results["memory"])
    if results.get("limits"):
        sections.append(limits_section(results["limits"]))
    if results.get("accuracy"):
        sections.append(accuracy_section(results["accuracy"]))
    sections.append(_bar_section(results.get("bar", ())))
    return "\n\n".join(section for section in sections if section)


def shown(spread: Metrics, digits: int = 2) -> str:
    """A spread as ``median [low, high]``."""
    low, high = (f"{spread[end]:.{digits}f}" for end in ("low", "high"))
    return f"{spread['median']:.{digits}f} [{low}, {high}]"


def _settings_section(results: Metrics) -> str:
    machine, settings = results["machine"], results["settings"]
    rows = [
        *((name, _plain(value)) for name, value in machine.items()),
        *((name, _plain(value)) for name, value in settings.items() if value is not None),
    ]
    return table("Machine and settings", ["", ""], rows, "")


def _contender_section(results: Metrics) -> str:
    rows = [
        *((name, text) for name, text in results["contenders"].items()),
        *((name, f"left out: {reason}") for name, reason in results["left_out"].items()),
    ]
    return table("Contenders", ["name", "what it is"], rows, "")


def _comparison_sections(title: str, comparison: Metrics) -> list[str]:
    where = f"{title}: batch of {comparison['batch']}"
    if "proposals" in comparison:
        where += f", {comparison['proposals']} proposals"
    contenders = comparison["contenders"]
    peers = list(dict.fromkeys(entry["against"] for entry in comparison["ratios"]))
    ratios = {(entry["what"], entry["against"]): entry["ratio"] for entry in comparison["ratios"]}
    rows = [
        [
            name,
            shown(figures["ms_per_image"], 1),
            *_regions(figures),
            *(shown(ratios[name, peer]) if (name, peer) in ratios else "" for peer in peers),
        ]
        for name, figures in contenders.items()
    ]
    counted = any("entered" in figures for figures in contenders.values())
    headers = [
        *("contender", "ms per image"),
        *(("regions: in, by stage", "detections") if counted else ()),
        *(f"faster than {peer}" for peer in peers),
    ]
    note = "Median [quartiles]; ratios are of pairs within a round."
    sections = [f"{table(where, headers, rows, '')}\n\n{note}"]
    return [*sections, *_agreement_section(comparison)]


def _regions(figures: Metrics) -> list[Any]:
    if "entered" not in figures:
        return []
    by_stage = ", ".join(f"{count:g}" for count in figures["entered"])
    return [f"{figures['arrived']:g}: {by_stage}", f"{figures['detections']:g}"]


def _agreement_section(comparison: Metrics) -> list[str]:
    agreement = comparison.get("agreement")
    if not agreement:
        return []
    rows = [
        [
            name,
            figures["detections"],
            figures["of_the_other"],
            figures["in_common"],
            f"{figures['box_difference']:.2g}",
            f"{figures['score_difference']:.2g}",
        ]
        for name, figures in agreement["contenders"].items()
    ]
    headers = [
        *("contender", "detections", f"of {agreement['with']}", "in common"),
        *("largest difference of boxes (pixels)", "of scores"),
    ]
    return [table(f"Detections beside those of {agreement['with']}", headers, rows, "")]


def _parts_section(comparison: Metrics) -> str:
    contenders: Mapping[str, Metrics] = comparison["contenders"]
    parts = sorted({part for times in contenders.values() for part in times}, key=_part_order)
    rows = [
        [name, *(f"{times[part]['median']:.1f}" if part in times else "" for part in parts)]
        for name, times in contenders.items()
    ]
    where = f"batch of {comparison['batch']}, {comparison['proposals']} proposals"
    return table(f"Parts, ms per image: {where}", ["contender", *parts], rows, "")


def _part_order(part: str) -> tuple[int, str]:
    if part in _STAGE_ORDER:
        return _STAGE_ORDER.index(part), part
    return len(_STAGE_ORDER) + (0 if part.startswith("stage") else 1), part


def _bar_section(claims: Sequence[Metrics]) -> str:
    rows = [
        [
            claim["what"],
            claim["contender"],
            claim["against"],
            "" if claim["batch"] is None else claim["batch"],
            "" if claim["proposals"] is None else claim["proposals"],
            shown(claim["ratio"])
            if isinstance(claim["ratio"], Mapping)
            else f"{claim['ratio']:.2f}",
            claim["bar"],
        ]
        for claim in claims
    ]
    headers = ["what", "contender", "against", "batch", "proposals", "measured", "bar"]
    return table("The bar", headers, rows, ".2f") if rows else ""


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
