"""Gates that take longer than they save: not run, and the log says so.

A gate looks at every region that arrives. On a small model or a fast GPU that can take longer than
the stages would take for the regions that leave there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from cascade_det.calibration.calibrator import Calibrator, build_policy
from cascade_det.calibration.latency_model import LatencyModel
from cascade_det.calibration.recording import Timing, time_policies
from cascade_det.calibration.search import Setting
from cascade_det.data.samples import Batch
from cascade_det.engine.detector import CascadeDetector

logger = logging.getLogger(__name__)

GATES_OFF = "GATES_OFF"


@dataclass(frozen=True)
class GateCost:
    """What a gate takes and saves, in milliseconds per image.

    Attributes:
        gate: 0 is before stage 0, s + 1 after stage s.
        takes: measured.
        saves: in stages and mask heads, by a latency model: what they take with the gate off, less
            what they take with it.
    """

    gate: int
    takes: float
    saves: float

    def __str__(self) -> str:
        place = f"after stage {self.gate - 1}" if self.gate else "before stage 0"
        verdict = "it is switched off" if self.takes > self.saves else "it stays"
        return (
            f"the gate {place} takes {self.takes:.2f} ms per image and saves {self.saves:.2f} ms: "
            f"{verdict}"
        )


def without_costly_gates(
    calibrator: Calibrator,
    settings: Mapping[str, Setting],
    detector: CascadeDetector,
    batches: Sequence[Batch],
    latency: LatencyModel,
    *,
    rounds: int,
) -> dict[str, Setting]:
    """Settings with ``GATES_OFF``, where gates take longer than they save; logs each gate.

    Args:
        calibrator: has the recording on which savings are replayed.
        settings: keys of ``MODEL.CASCADE.EXIT``, by a name for the log.
        detector: that was recorded, with its device.
        batches: to measure gates on, of equal size.
        latency: of the device.
        rounds: how often each batch is run with each setting.
    """
    own = detector.cascade.exits
    learned = None if own is None else own.learned
    if not settings:
        return {}
    policies = {
        name: build_policy(calibrator.cfg, setting, learned) for name, setting in settings.items()
    }
    timings = time_policies(detector, batches, policies, rounds=rounds)
    changed = {}
    for name, setting in settings.items():
        costs = _find_costly(calibrator, setting, timings[name], latency, len(batches[0]))
        for cost in costs:
            logger.info("%s.yaml: %s", name, cost)
        off = tuple(sorted(cost.gate for cost in costs if cost.takes > cost.saves))
        changed[name] = {**setting, GATES_OFF: off} if off else dict(setting)
    return changed


def _find_costly(
    calibrator: Calibrator,
    setting: Setting,
    timings: Sequence[Timing],
    latency: LatencyModel,
    batch_size: int,
) -> list[GateCost]:
    """The cost of every gate, in order: the worst is switched off first.

    The gates after it then save more, so that they are judged again.
    """
    takes = [median(ms) / batch_size for ms in zip(*(t.gates for t in timings), strict=True)]
    off: dict[int, GateCost] = {}
    while True:
        time_on = _milliseconds(calibrator, setting, off, latency)
        policy = calibrator.policy(_with_off(setting, off))
        costs = [
            GateCost(
                gate,
                takes[gate],
                _milliseconds(calibrator, setting, [*off, gate], latency) - time_on,
            )
            for gate in range(calibrator.num_stages)
            if policy.has_gate(gate - 1)
        ]
        worst = max(costs, key=lambda cost: cost.takes - cost.saves, default=None)
        if worst is None or worst.takes <= worst.saves:
            return sorted([*costs, *off.values()], key=lambda cost: cost.gate)
        off[worst.gate] = worst


def _milliseconds(
    calibrator: Calibrator, setting: Setting, off: Iterable[int], latency: LatencyModel
) -> float:
    """Of stages and mask heads, per image, with some gates off."""
    trial = calibrator.trials.replay(calibrator.policy(_with_off(setting, off)))
    return latency.per_image(trial.entered, trial.masks, trial.tiles)


def _with_off(setting: Setting, off: Iterable[int]) -> Setting:
    return {**setting, GATES_OFF: tuple(sorted(off))}
