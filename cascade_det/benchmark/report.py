"""The results of a benchmark as tables in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cascade_det.benchmark.accuracy import accuracy_section
from cascade_det.benchmark.attention_memory import attention_section
from cascade_det.benchmark.limits import limits_section
from cascade_det.benchmark.memory import memory_sections
from cascade_det.benchmark.tiles import tiles_section
from cascade_det.benchmark.waits import waits_section
from cascade_det.report.tables import Metrics, part_order, table

TITLES = {
    "heads": "RoI heads alone",
    "masks": "Masks of given boxes",
    "whole": "Whole model",
    "training": "Training step",
}

BACKBONE_TITLE = "Trunk and neck"
WHOLE_TITLE = "Whole model, optimised, with exits"

_BACKBONE_SIZES = {"parameters": 1e6, "multiply_adds": 1e9, "training_memory": 1e6}


def format_benchmark(results: Metrics) -> str:
    """Tables of everything that was measured."""
    machine, settings = results["machine"], results["settings"]
    rows = [(name, _plain(value)) for name, value in machine.items()]
    rows += [(name, _plain(value)) for name, value in settings.items() if value is not None]
    sections: list[str] = [table("Machine and settings", ["", ""], rows, "")]
    rows = list(results["contenders"].items())
    rows += [(name, f"left out: {reason}") for name, reason in results["left_out"].items()]
    sections.append(table("Models", ["name", "description"], rows, ""))
    for measurement, title in TITLES.items():
        for comparison in results.get(measurement, ()):
            sections.append(_comparison_section(title, comparison))
            if comparison.get("agreement"):
                sections.append(_agreement_section(comparison["agreement"]))
            if comparison.get("differences"):
                sections.append(_mask_section(comparison))
            if comparison.get("labels"):
                sections.append(_label_section(comparison["labels"]))
    sections += [_parts_section(comparison) for comparison in results.get("parts", ())]
    sections += map(_backbone_sections, results.get("backbones", ()))
    if results.get("memory"):
        sections += memory_sections(results["memory"])
    for name, section in _SECTIONS.items():
        if results.get(name):
            sections.append(section(results[name]))
    return "\n\n".join(sections)


def where(comparison: Metrics) -> str:
    """The batch size of a comparison, and its number of proposals or masks if it has one."""
    counts = [f"{comparison[of]:g} {of}" for of in ("proposals", "masks") if of in comparison]
    return ", ".join([f"batch of {comparison['batch']}", *counts])


def _comparison_section(title: str, comparison: Metrics) -> str:
    models = comparison["contenders"]
    ratios = {(entry["what"], entry["against"]): entry["ratio"] for entry in comparison["ratios"]}
    baselines = list(dict.fromkeys(baseline for _, baseline in ratios))
    counted = any("entered" in measured for measured in models.values())
    rows = []
    for name, measured in models.items():
        row = [name, _spread(measured["ms_per_image"], 1)]
        if counted:
            entered = ", ".join(f"{count:g}" for count in measured["entered"])
            row += [f"{measured['arrived']:g}: {entered}", f"{measured['detections']:g}"]
        for baseline in baselines:
            pair = (name, baseline)
            row.append(_spread(ratios[pair]) if pair in ratios else "")
        rows.append(row)
    headers = ["model", "ms per image"]
    headers += ["regions: in, by stage", "detections"] if counted else []
    headers += [f"times as fast as {baseline}" for baseline in baselines]
    note = "Median [quartiles]; ratios are taken within each round."
    return f"{table(f'{title}: {where(comparison)}', headers, rows, '')}\n\n{note}"


def _agreement_section(agreement: Metrics) -> str:
    reference = agreement["with"]
    rows = [
        [
            name,
            compared["detections"],
            compared["of_the_other"],
            compared["in_common"],
            f"{compared['box_difference']:.2g}",
            f"{compared['score_difference']:.2g}",
        ]
        for name, compared in agreement["contenders"].items()
    ]
    headers = ["model", "detections", f"of {reference}", "in common"]
    headers += ["largest difference of boxes (pixels)", "of scores"]
    return table(f"Detections compared with {reference}", headers, rows, "")


def _label_section(labels: Metrics) -> str:
    rows = [
        [name, f"{found['same_class']:.4%}", f"{found['difference']:.2g}"]
        for name, found in labels.items()
    ]
    headers = ["model", "pixels of the same class", "largest difference, as a share of logits"]
    return table("Labels compared with ours", headers, rows, "")


def _mask_section(comparison: Metrics) -> str:
    differences = comparison["differences"]
    rows = [[name, f"{value:.2g}"] for name, value in differences["contenders"].items()]
    title = f"Masks compared with {differences['with']}"
    section = table(title, ["model", "largest difference of probabilities"], rows, "")
    if comparison["rules"] is None:
        return section
    kept = f"{comparison['rules']:.1f} masks per image"
    return f"{section}\n\nThe rules of MODEL.CASCADE.MASK keep {kept}; all are timed."


def _parts_section(comparison: Metrics) -> str:
    models: Mapping[str, Metrics] = comparison["contenders"]
    parts = sorted({part for times in models.values() for part in times}, key=part_order)
    rows = []
    for name, times in models.items():
        total = sum(spread["median"] for spread in times.values())
        shown = {
            part: f"{spread['median']:.1f} ({spread['median'] / total:.0%})"
            for part, spread in times.items()
        }
        rows.append([name] + [shown.get(part, "") for part in parts])
    title = f"Parts, ms per image (share): {where(comparison)}"
    return table(title, ["model", *parts], rows, "")


def _backbone_sections(comparison: Metrics) -> str:
    ratios = {entry["what"]: entry for entry in comparison["ratios"]}
    rows = []
    for name, measured in comparison["contenders"].items():
        row = [name, _spread(measured["ms_per_image"], 1)]
        row.append(_spread(ratios[name]["ratio"]) if name in ratios else "")
        if "parameters" in measured:
            height, width = measured["input"]
            row += [f"{measured[key] / unit:.1f}" for key, unit in _BACKBONE_SIZES.items()]
            row += [f"{height} x {width}", ""]
        else:
            row += [*[""] * (len(_BACKBONE_SIZES) + 1), f"{measured['difference']:.1g}"]
        rows.append(row)
    first = next(iter(comparison["contenders"].values()))["kind"]
    headers = ["trunk and neck", "ms per image", f"times as fast as {first}"]
    headers += ["parameters (M)", "multiply-adds (G)", "training (MB)", "input", "difference"]
    note = (
        "Median [quartiles]; ratios are taken within each round and setting. Training: peak memory "
        "of forward and backward pass above the model. Difference: of maps from the plain ones, as "
        "a share; many layers of drawn weights amplify rounding."
    )
    section = table(f"{BACKBONE_TITLE}: {where(comparison)}", headers, rows, "")
    whole = _comparison_section(WHOLE_TITLE, comparison["whole"])
    return f"{section}\n\n{note}\n\n{whole}"


def _target_section(targets: Sequence[Metrics]) -> str:
    rows = []
    for target in targets:
        ratio = target["ratio"]
        rows.append(
            [
                target["what"],
                target["contender"],
                target["against"],
                "" if target["batch"] is None else target["batch"],
                "" if target["proposals"] is None else target["proposals"],
                _spread(ratio) if isinstance(ratio, Mapping) else f"{ratio:.2f}",
                target["bar"],
            ]
        )
    headers = ["what", "model", "against", "batch", "proposals", "measured", "target"]
    return table("Targets (speed and memory: on a CPU)", headers, rows, ".2f")


def _spread(spread: Metrics, digits: int = 2) -> str:
    """``median [low, high]``."""
    median, low, high = (f"{spread[key]:.{digits}f}" for key in ("median", "low", "high"))
    return f"{median} [{low}, {high}]"


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


# Sections of further measurements; each takes what its measurement returned.
_SECTIONS: dict[str, Callable[[Any], str]] = {
    "limits": limits_section,
    "accuracy": accuracy_section,
    "attention": attention_section,
    "waits": waits_section,
    "tiles": tiles_section,
    "bar": _target_section,
}
