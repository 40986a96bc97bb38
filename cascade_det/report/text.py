"""The results of an evaluation as text and as ``results.json``."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cascade_det.files import write_json
from cascade_det.report.exit_tables import exit_sections, shadow_section
from cascade_det.report.semantic_tables import semantic_sections
from cascade_det.report.tables import Metrics, part_order, shown_name, stage_names, table

RESULTS_FILE = "results.json"
_TASKS = {
    "bbox": "Box AP",
    "segm": "Mask AP",
    "boundary": "Boundary AP",
    "keypoints": "Keypoint AP",
    "lvis": "Box AP of rare, common and frequent classes",
    "lvis_segm": "Mask AP of rare, common and frequent classes",
}
_AUGMENTED = {f"{task}_TTA": f"{title} with augmentation" for task, title in _TASKS.items()}
_STAGE_AP = ("AP", "AP50", "AP75", "AP90")
_TIMES = ("median_ms", "p95_ms")
_MOST_CONFUSED = _WORST_NAMED = 5


def write_results(
    results: Metrics,
    output_dir: str | os.PathLike[str],
    *,
    machine: Mapping[str, Any] | None = None,
) -> Path:
    """Write the results of all evaluators to ``results.json`` in a folder.

    Args:
        results: the merged dicts of the evaluators. A nan becomes ``null``.
        output_dir: created if missing; an old file is replaced in one step.
        machine: where they were measured, see ``describe_machine``.

    Returns:
        The path of the file.
    """
    path = Path(output_dir) / RESULTS_FILE
    write_json({**results, "machine": machine} if machine else results, path, indent=2)
    return path


def describe_machine(device: torch.device | str = "cpu", dtype: str = "float32") -> dict[str, Any]:
    """The hardware and software that times depend on.

    Args:
        device: where the model runs.
        dtype: of its weights, in which it computes, for example ``"bfloat16"``.

    Returns:
        Plain values by name. Where PyTorch computes in another type all the same, also ``autocast``
        (its type, while it is on) or ``tf32`` (what of float32 a GPU computes with the 10 bits of
        TF32; convolutions, unless that is switched off).
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    return {
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        **_other_types(device, dtype),
        "torch": torch.__version__,
    }


def _other_types(device: torch.device, dtype: str) -> dict[str, str]:
    if torch.is_autocast_enabled(device.type):
        return {"autocast": str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")}
    if (
        device.type != "cuda"
        or "float32" not in dtype
        or torch.cuda.get_device_capability(device) < (8, 0)
    ):
        return {}
    allowed = {
        "convolutions": torch.backends.cudnn.allow_tf32,
        "products": torch.get_float32_matmul_precision() != "highest",
    }
    names = [name for name, is_allowed in allowed.items() if is_allowed]
    return {"tf32": " and ".join(names)} if names else {}


def format_report(results: Metrics) -> str:
    """All tables of the results in Markdown.

    Args:
        results: the merged dicts of the evaluators, and ``machine``; any of them may be missing.
    """
    return "\n\n".join(text for parts in report_sections(results).values() for text in parts)


def report_sections(results: Metrics) -> dict[str, list[str]]:
    """The tables and sentences of ``format_report`` by section, each in Markdown.

    A table is a :class:`cascade_det.report.tables.Table`. Sections may be empty.
    """
    titles = _TASKS | _AUGMENTED
    sections = {
        "ap": [_ap_section(title, results.get(task)) for task, title in titles.items()],
        "pixels": semantic_sections(results),
        "classes": _analysis_sections(results.get("analysis"), results.get("segm")),
        "stages": _stage_section(results.get("stages")),
        "exits": [*exit_sections(results.get("exits")), shadow_section(results.get("shadow"))],
        "latency": _latency_section(results.get("latency")),
        "machine": [_machine_section(results.get("machine"))],
        "warnings": [_warnings_section(results)],
    }
    return {name: [text for text in parts if text] for name, parts in sections.items()}


def _ap_section(title: str, metrics: Metrics | None) -> str:
    if not metrics:
        return ""
    # Without those of single classes, AP-<class>.
    names = [name for name in metrics if "-" not in name]
    return table(f"{title} (%)", names, [[metrics[name] for name in names]], ".1f")


def _analysis_sections(analysis: Metrics | None, segm: Metrics | None) -> list[str]:
    if not analysis:
        return []
    chosen, best = analysis["overall"]
    shares = ("precision", "recall", "F1")
    counts = ("true_positives", "false_positives", "misses")
    points = [
        (f"{point['score']:.3f} or more{suffix}", *(point[name] for name in (*shares, *counts)))
        for point, suffix in ((chosen, ""), (best, " (best F1)"))
    ]
    by_masks = analysis["task"] == "segm"
    if by_masks:
        segm = None  # It has the same AP.
    overall = table(
        f"Precision and recall at {'mask ' * by_masks}IoU {chosen['IoU']}",
        ("score", *(f"{name} (%)" for name in shares), "hits", "false positives", "misses"),
        points,
        ("", ".1f", ".1f", ".1f"),
    )
    ap_names = ("AP", "AP50", *(["mask AP"] if segm else []), *shares)
    classes = [
        (
            *(row[name] for name in ("class", "objects", "AP", "AP50")),
            # Detectron2 gives none for a single class, whose AP is that of all.
            *([segm.get(f"AP-{row['class']}", segm["AP"])] if segm else []),
            *(row[name] for name in shares),
            *(row["best"][name] for name in ("F1", "score")),
        )
        for row in analysis["per_class"]
    ]
    per_class = table(
        f"{'Mask' if by_masks else 'Box'} AP per class; precision, recall and F1 at score "
        f"{chosen['score']}",
        ("class", "objects", *(f"{name} (%)" for name in (*ap_names, "best F1")), "at score"),
        classes,
        ("", "", *[".1f"] * (len(ap_names) + 1), ".2f"),
    )
    return [overall, per_class, *_mistake_lines(analysis)]


def _mistake_lines(analysis: Metrics) -> list[str]:
    names, counts = (analysis["confusion_matrix"][key] for key in ("classes", "counts"))
    confused = sorted(
        (
            (-count, names[true], names[detected])
            for true, row in enumerate(counts[:-1])
            for detected, count in enumerate(row[:-1])
            if count and true != detected
        ),
    )[:_MOST_CONFUSED]
    worst = analysis["worst_images"][:_WORST_NAMED]
    lines = []
    if confused:
        listed = ", ".join(
            f"{shown_name(true)} as {shown_name(detected)} ({-count:,})"
            for count, true, detected in confused
        )
        lines.append(f"Most confused: {listed}.")
    if worst:
        listed = ", ".join(
            f"{shown_name(image['file_name']) or image['image_id']} "
            f"({image['false_positives']} false, {image['misses']} missed)"
            for image in worst
        )
        lines.append(f"Images with the most mistakes: {listed}.")
    return lines


def _stage_section(stages: Metrics | None) -> list[str]:
    if not stages or not stage_names(stages):
        return []
    names = stage_names(stages)
    mask_ap = _STAGE_AP if "segm" in stages[names[0]] else ()
    rows = [
        (
            name,
            *(stages[name][key] for key in _STAGE_AP),
            *(stages[name]["segm"][key] for key in mask_ap),
            *(stages[name][key] for key in ("iou_before", "iou_after")),
        )
        for name in names
    ]
    columns = [*_STAGE_AP, *(f"mask {name}" for name in mask_ap)]
    of_stages = table(
        "If the cascade stopped after a stage",
        ("after", *(f"{name} (%)" for name in columns), "mean IoU before", "mean IoU after"),
        rows,
        ("", *[".1f"] * len(columns), ".3f", ".3f"),
    )
    return [of_stages, f"Mean IoU over {stages['regions']:,} regions that match an object."]


def _latency_section(latency: Metrics | None) -> list[str]:
    if not latency or "parts" not in latency:
        return []
    columns = [(latency["parts"], latency["total"])]
    headers = ["part", "median (ms)", "p95 (ms)"]
    if "full_parts" in latency:
        columns.append((latency["full_parts"], latency["full_total"]))
        headers += ["without exits: median (ms)", "p95 (ms)"]
    names = sorted({part for parts, _ in columns for part in parts}, key=part_order)
    rows = [
        (name, *(parts.get(name, {}).get(key) for parts, _ in columns for key in _TIMES))
        for name in names
    ]
    rows.append(("total", *(total[key] for _, total in columns for key in _TIMES)))
    saving = latency["most_exits_could_save"]
    saving_text = "unknown" if math.isnan(saving) else f"{100 * saving:.1f} %"
    return [
        table("Latency per image", headers, rows, ".2f"),
        f"Batches of {latency['batch_size']}, {latency['images']:,} images after "
        f"{latency['warmup_batches']} warm-up batches. The most that exits could save here, "
        f"(t_full - t_stage1) / t_full: {saving_text}.",
    ]


def _machine_section(machine: Metrics | None) -> str:
    if not machine:
        return ""
    return "Measured on: " + ", ".join(f"{key} {value}" for key, value in machine.items()) + "."


def _warnings_section(results: Metrics) -> str:
    warnings = [*results.get("notes", ()), *results.get("latency", {}).get("notes", ())]
    return "\n".join(["Warnings:", *(f"- {text}" for text in warnings)]) if warnings else ""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()
