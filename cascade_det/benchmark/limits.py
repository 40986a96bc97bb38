"""Where the time of a detector goes, and how far each part stands from what the machine can.

The limit of a part is the longer of two times: of its multiply-adds at the highest measured rate,
and of the bytes that it has to move at the rate of a copy. These are its weights and inputs, read
once, and what it hands to later parts, written once; whatever it keeps for itself in between might
stay in a cache. Convolutions count as the direct ones: those of Winograd multiply less, and so may
take less time than this limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from cascade_det.benchmark.contenders import Contender, Standalone
from cascade_det.benchmark.machine import Peaks, measure_peaks
from cascade_det.benchmark.setup import Setup
from cascade_det.benchmark.work import Work, count_work
from cascade_det.engine.allocator import keep_freed_memory
from cascade_det.report.tables import Metrics, table

# The fastest of them that runs is looked at.
_CONTENDERS = ("ours-fast-exits", "ours-fast", "ours")


@dataclass(frozen=True)
class PartLimit:
    """A part at the limit of the machine, and as it was measured; milliseconds of one call.

    Attributes:
        part: its name.
        multiply_adds: see ``Work``.
        bytes_moved: likewise.
        operations_ms: what the multiply-adds take at the peak.
        transfer_ms: what the bytes take at the peak.
        limit_ms: the longer of the two.
        measured_ms: what it took.
        ratio: measured by limit; nan where the part has nothing to do.
    """

    part: str
    multiply_adds: int
    bytes_moved: int
    operations_ms: float
    transfer_ms: float
    limit_ms: float
    measured_ms: float
    ratio: float


def measure_limits(setup: Setup, contenders: Mapping[str, Contender]) -> dict[str, Any]:
    """The parts of the fastest standalone contender beside the limits of the machine.

    Its work is counted on the detector as it was built, with the same exits on the same images.

    Args:
        setup: what the contenders share.
        contenders: those that run, by name.

    Returns:
        ``contender``, ``batch``, ``proposals``, ``dtype``, ``peaks`` (see ``Peaks``) and ``parts``
        (each as ``PartLimit``), for a whole batch; empty if no such contender runs.
    """
    name = next((name for name in _CONTENDERS if name in contenders), None)
    if name is None:
        return {}
    contender, options = contenders[name], setup.options
    batch, proposals = setup.batches(options.batches[0])[0], options.proposals[0]
    plain = Standalone(setup.build_ours())
    plain.set_exits(contender.exits)
    for model in (plain, contender):
        model.limit_proposals(proposals)
    work = count_work(plain.detector, batch)
    inputs = contender.inputs(batch)
    keep_freed_memory(contender.keeps_memory)
    for _ in range(options.warmup):
        contender.whole(inputs)
    runs = [contender.parts(inputs) for _ in range(options.rounds)]
    milliseconds = {part: median(run.get(part, 0.0) for run in runs) for part in runs[0]}
    dtype = _narrowest_dtype(contender.model)
    peaks = measure_peaks(setup.device, (dtype,))
    limits = find_limits(work, milliseconds, peaks, dtype)
    return {
        "contender": name,
        "batch": len(batch),
        "proposals": proposals,
        "dtype": str(dtype).removeprefix("torch."),
        "peaks": peaks.to_dict(),
        "parts": [asdict(limit) for limit in limits],
    }


def find_limits(
    work: Mapping[str, Work],
    milliseconds: Mapping[str, float],
    peaks: Peaks,
    dtype: torch.dtype = torch.float32,
) -> list[PartLimit]:
    """The parts that were counted and timed, and "total" at the end.

    Args:
        work: see ``count_work``.
        milliseconds: that each part took for the same batch.
        peaks: of the machine that it was timed on.
        dtype: that it was computed in; parts that stayed in a wider type are farther from their
            limit for it.
    """
    limits = [
        _limit(part, work[part], milliseconds[part], peaks, dtype)
        for part in work
        if part in milliseconds
    ]
    sums = {
        name: sum(getattr(limit, name) for limit in limits)
        for name in asdict(limits[0])
        if name not in ("part", "ratio")
    }
    ratio = _ratio(sums["measured_ms"], sums["limit_ms"])
    return [*limits, PartLimit("total", **sums, ratio=ratio)]


def limits_section(results: Metrics) -> str:
    """What ``measure_limits`` gave, as a table in Markdown; empty of nothing."""
    if not results:
        return ""
    limits = [PartLimit(**part) for part in results["parts"]]
    dtype, peaks, total = results["dtype"], results["peaks"], limits[-1].measured_ms
    rows = [
        (
            limit.part,
            limit.multiply_adds / 1e9,
            limit.bytes_moved / 1e6,
            limit.operations_ms,
            limit.transfer_ms,
            limit.measured_ms,
            100 * limit.measured_ms / total,
            limit.ratio,
        )
        for limit in limits
    ]
    headers = ["part", "multiply-adds (1e9)", "MB to move", "operations (ms)", "transfer (ms)"]
    headers += ["measured (ms)", "share (%)", "times the limit"]
    title = (
        f"Distance to the limit of the machine: {results['contender']}, batch of "
        f"{results['batch']}, {results['proposals']} proposals"
    )
    note = (
        f"The limit is the longer of the two times at the best measured rates: products of {dtype} "
        f"{peaks['products'][dtype] / 1e9:.1f}, convolutions "
        f"{peaks['convolutions'][dtype] / 1e9:.1f} billion multiply-adds per second, a copy "
        f"{peaks['bytes_moved'] / 1e9:.1f} GB per second. Convolutions count as direct ones: "
        "Winograd's may fall below."
    )
    return f"{table(title, headers, rows, ('', *['.2f'] * 5, '.1f', '.2f'))}\n\n{note}"


def _limit(
    part: str, work: Work, measured_ms: float, peaks: Peaks, dtype: torch.dtype
) -> PartLimit:
    moved = work.bytes_moved(dtype)
    operations_ms = 1e3 * work.multiply_adds / peaks.multiply_adds(dtype)
    transfer_ms = 1e3 * moved / peaks.bytes_moved
    limit_ms = max(operations_ms, transfer_ms)
    return PartLimit(
        part,
        work.multiply_adds,
        moved,
        operations_ms,
        transfer_ms,
        limit_ms,
        measured_ms,
        _ratio(measured_ms, limit_ms),
    )


def _ratio(measured_ms: float, limit_ms: float) -> float:
    return measured_ms / limit_ms if limit_ms else float("nan")


def _narrowest_dtype(model: Any) -> torch.dtype:
    """The type that the detector of a standalone contender computes the most of its products in."""
    return min((x.dtype for x in model.detector.parameters()), key=lambda dtype: dtype.itemsize)
