"""Where the time of a detector goes, and how far each part is from the limit of the machine.

The limit of a part is the longer of two times: of its multiply-adds at the highest measured rate,
and of the bytes it has to move at the rate of a copy. These bytes are its weights and inputs, read
once, and what it passes on to later parts, written once; everything else could stay in a cache.
Convolutions count as direct ones, so that Winograd's, which multiply less, may be below the limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

import torch

from cascade_det.benchmark.models import BenchmarkModel, Standalone
from cascade_det.benchmark.peaks import measure_peaks
from cascade_det.benchmark.setup import Setup
from cascade_det.benchmark.work import Work, count_work
from cascade_det.engine.allocator import keep_freed_memory
from cascade_det.report.tables import Metrics, table

# The first of these that runs is measured.
_FASTEST = ("ours-fast-exits", "ours-fast", "ours")
_SUMS = ("multiply_adds", "bytes_moved", "operations_ms", "transfer_ms", "limit_ms", "measured_ms")


def measure_limits(setup: Setup, models: Mapping[str, BenchmarkModel]) -> dict[str, Any]:
    """Measure the parts of the fastest standalone model, and the limits of the machine.

    The work is counted on the detector as built, with the same exits on the same images.

    Args:
        setup: what all models share.
        models: the ones that run, by name.

    Returns:
        ``contender`` (its name), ``batch``, ``proposals``, ``dtype``, ``peaks`` (see
        ``measure_peaks``) and ``parts`` (see ``find_limits``), for a whole batch; empty if no such
        model runs.
    """
    name = next((name for name in _FASTEST if name in models), None)
    if name is None:
        return {}
    model, options = models[name], setup.options
    adapter: Any = model.adapter
    batch, proposals = setup.batches(options.batches[0])[0], options.proposals[0]
    plain = Standalone(setup.build_ours())
    plain.set_exits(model.exits)
    plain.limit_proposals(proposals)
    adapter.limit_proposals(proposals)
    work = count_work(plain.detector, batch)
    inputs = adapter.inputs(batch)
    keep_freed_memory(model.keeps_memory)
    for _ in range(options.warmup):
        model.run(adapter.whole, inputs)
    runs = [model.parts(inputs) for _ in range(options.rounds)]
    milliseconds = {part: median(run.get(part, 0.0) for run in runs) for part in runs[0]}
    # The dtype of most products.
    dtype = min((x.dtype for x in adapter.detector.parameters()), key=lambda dtype: dtype.itemsize)
    peaks = measure_peaks(setup.device, dtype)
    return {
        "contender": name,
        "batch": len(batch),
        "proposals": proposals,
        "dtype": str(dtype).removeprefix("torch."),
        "peaks": peaks,
        "parts": find_limits(work, milliseconds, peaks, dtype),
    }


def find_limits(
    work: Mapping[str, Work],
    milliseconds: Mapping[str, float],
    peaks: Metrics,
    dtype: torch.dtype,
) -> list[dict[str, Any]]:
    """The limit of each part that was counted and timed, and of the "total" at the end.

    Args:
        work: by part, see ``count_work``.
        milliseconds: measured time, by part.
        peaks: see ``measure_peaks``.
        dtype: of the peaks. Parts in a wider dtype are farther from their limit for it.

    Returns:
        Rows with ``part``, ``multiply_adds``, ``bytes_moved``, ``operations_ms``,
        ``transfer_ms``, ``limit_ms`` (the longer of these two), ``measured_ms`` and ``ratio``
        (measured by limit; nan for parts without work).
    """
    name = str(dtype).removeprefix("torch.")
    rate = max(peaks["products"][name], peaks["convolutions"][name])
    rows: list[dict[str, Any]] = []
    for part in work:
        if part in milliseconds:
            moved = work[part].bytes_moved(dtype)
            operations_ms = 1e3 * work[part].multiply_adds / rate
            transfer_ms = 1e3 * moved / peaks["bytes_moved"]
            values = (
                work[part].multiply_adds,
                moved,
                operations_ms,
                transfer_ms,
                max(operations_ms, transfer_ms),
                milliseconds[part],
            )
            rows.append({"part": part, **dict(zip(_SUMS, values, strict=True))})
    rows.append({"part": "total", **{key: sum(row[key] for row in rows) for key in _SUMS}})
    for row in rows:
        row["ratio"] = row["measured_ms"] / row["limit_ms"] if row["limit_ms"] else float("nan")
    return rows


def limits_section(results: Metrics) -> str:
    """The results of ``measure_limits`` as a table in Markdown."""
    dtype, peaks, parts = results["dtype"], results["peaks"], results["parts"]
    total = parts[-1]["measured_ms"]
    rows = [
        (
            row["part"],
            row["multiply_adds"] / 1e9,
            row["bytes_moved"] / 1e6,
            row["operations_ms"],
            row["transfer_ms"],
            row["measured_ms"],
            100 * row["measured_ms"] / total,
            row["ratio"],
        )
        for row in parts
    ]
    headers = ["part", "multiply-adds (1e9)", "MB to move", "operations (ms)", "transfer (ms)"]
    headers += ["measured (ms)", "share (%)", "times the limit"]
    title = (
        f"Distance to the limit of the machine: {results['contender']}, batch of "
        f"{results['batch']}, {results['proposals']} proposals"
    )
    note = (
        f"The limit is the longer of the two times at the highest measured rates: products of "
        f"{dtype} {peaks['products'][dtype] / 1e9:.1f}, convolutions "
        f"{peaks['convolutions'][dtype] / 1e9:.1f} billion multiply-adds per second, a copy "
        f"{peaks['bytes_moved'] / 1e9:.1f} GB per second. Convolutions count as direct ones: "
        "Winograd's may be below the limit."
    )
    formats = ("", ".2f", ".2f", ".2f", ".2f", ".2f", ".1f", ".2f")
    return f"{table(title, headers, rows, formats)}\n\n{note}"
