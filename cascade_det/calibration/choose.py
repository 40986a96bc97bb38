"""From a target to one setting of a sequence."""

from __future__ import annotations

from collections.abc import Callable

from cascade_det.calibration.evidence import Evidence, Images
from cascade_det.calibration.exit_sequence import LEAST_SAVING, USUAL_DROP, Choice, ExitSequence
from cascade_det.calibration.latency_model import LatencyModel
from cascade_det.calibration.risk_control import fixed_sequence
from cascade_det.calibration.search import Setting
from cascade_det.calibration.target import Target
from cascade_det.calibration.trials import Trial
from cascade_det.errors import ConfigError


def choose(sequence: ExitSequence, target: Target, latency: LatencyModel | None) -> Choice:
    """The setting of a sequence for a target.

    Args:
        sequence: from the full cascade to risky exits.
        target: the goal.
        latency: of the device; for a target in milliseconds, and for the tile gate.

    Raises:
        ConfigError: no setting reaches the target.
    """
    tile_gate = latency if latency is not None and latency.per_tile else None
    if target.max_ap_drop is not None:
        if tile_gate is None:
            return sequence.within(target.max_ap_drop)
        return sequence.within_gated(target.max_ap_drop, time_by(tile_gate, sequence.evidence))
    if target.risk is not None:
        risk, delta = target.risk, target.delta
        # By time alone: a test of what the losses chose would promise too much.
        return sequence.passing(
            lambda trials, images: fixed_sequence(
                (trial.lost[images] for trial in trials), risk, delta
            ),
            tile_gate=tile_gate is not None and _saves_tiles(sequence, tile_gate),
        )
    if target.latency_ms is not None:
        assert latency is not None
        return _within_time(sequence, target.latency_ms, latency, tile_gate=tile_gate is not None)
    assert target.exit_rate is not None
    return _with_exit_rate(sequence, target.exit_rate, tile_gate)


def time_by(latency: LatencyModel, evidence: Evidence) -> Callable[[Setting], float]:
    """Milliseconds per image of a setting, on the images that judge."""

    def milliseconds(setting: Setting) -> float:
        trial = evidence.trial(setting)
        return latency.per_image(trial.entered, trial.masks, trial.tiles)

    return milliseconds


def _within_time(
    sequence: ExitSequence, most: float, latency: LatencyModel, *, tile_gate: bool
) -> Choice:
    """The safest setting within some milliseconds."""

    def milliseconds(trial: Trial, images: Images) -> float:
        return latency.per_image(
            trial.entered[:, images], trial.masks[images], trial.tiles[:, images]
        )

    found = sequence.reaching(
        lambda trial, images: milliseconds(trial, images) <= most, tile_gate=tile_gate
    )
    if found is not None:
        return found
    tried = [*sequence.settings]
    if tile_gate:
        places = range(len(tried))
        tried += [sequence.setting(p, tile=sequence.usual_tile(p)) for p in places]
    fastest = min(map(time_by(latency, sequence.evidence), tried))
    raise ConfigError(
        f"--latency-ms {most}: the fastest setting takes {fastest:.1f} ms per image on "
        "this device. Give another target."
    )


def _with_exit_rate(sequence: ExitSequence, rate: float, tile_gate: LatencyModel | None) -> Choice:
    """The safest setting, with a step of the tile gate that loses next to nothing beside it."""
    full = sequence.evidence.full

    def skips(trial: Trial, images: Images) -> bool:
        later = (one.entered[1:, images].sum() for one in (trial, full))
        return bool(1 - next(later) / max(next(later), 1) >= rate)

    found = sequence.reaching(skips)
    if found is None:
        trials = [sequence.trial(place) for place in range(len(sequence.settings))]
        raise ConfigError(
            f"--exit-rate {rate}: the most that a setting skips is "
            f"{max(t.exit_rate(full) for t in trials):.3f} of the later stages' regions. Give "
            "another target."
        )
    if tile_gate is None:
        return found
    bound = float(sequence.bounds(found.place)[0]) if found.place else 0.0
    costs = time_by(tile_gate, sequence.evidence)
    gated = sequence.within_tiles(found, bound + USUAL_DROP, costs)
    reaches = sequence.trial(gated.place, tile=gated.tile).exit_rate(full) >= rate
    return gated if reaches else found


def _saves_tiles(sequence: ExitSequence, latency: LatencyModel) -> bool:
    """Whether tile gates save time, in the mean over the sequence."""
    milliseconds, takes = time_by(latency, sequence.evidence), [0.0, 0.0]
    for place in range(len(sequence.settings)):
        for index, tile in enumerate((0, sequence.usual_tile(place))):
            takes[index] += milliseconds(sequence.setting(place, tile=tile))
    return takes[1] < (1 - LEAST_SAVING) * takes[0]
