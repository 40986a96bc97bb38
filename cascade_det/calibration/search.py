"""The search for exits that save the most work for what they lose.

A setting gives values to keys of ``MODEL.CASCADE.EXIT``; what it does not name is off. A knob is
one key, or one place of a tuple, with values from safe (off) to risky.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cascade_det.calibration.trials import Outcome

Setting = dict[str, Any]

# Percent points of loss that a search pays for the whole work: small ones stay near the full AP.
TRADE_OFFS = (0.05, 0.2, 0.8, 3.0, 12.0)
PASSES = 2


@dataclass(frozen=True)
class Parameter:
    """Something to turn.

    Attributes:
        name: of what is turned.
        settings: from safe to risky; the first one turns it off.
    """

    name: str
    settings: tuple[Setting, ...]


@dataclass
class Search:
    """Turns knobs one after another, and remembers every trial.

    Args:
        knobs: to turn.
        run: tries a setting.
        on_trial: called after each new trial.

    Attributes:
        tried: outcomes by the places of the knobs.
    """

    knobs: Sequence[Parameter]
    run: Callable[[Setting], Outcome]
    on_trial: Callable[[], object] = lambda: None
    tried: dict[tuple[int, ...], Outcome] = field(default_factory=dict)

    def setting(self, places: Sequence[int]) -> Setting:
        """All keys that knobs at these places set; tuples of several knobs are overlaid."""
        merged: Setting = {}
        for knob, place in zip(self.knobs, places, strict=True):
            for key, value in knob.settings[place].items():
                merged[key] = _overlay(merged[key], value) if key in merged else value
        return merged

    def trial(self, places: Sequence[int]) -> Outcome:
        """What comes of the knobs at these places, which are tried at most once."""
        key = tuple(places)
        if key not in self.tried:
            self.tried[key] = self.run(self.setting(places))
            self.on_trial()
        return self.tried[key]

    def search(self, most_trials: int) -> None:
        """For each price, turn every knob to its best place, a few times over.

        The lower the price of work, the closer to the full cascade the outcome is. A price goes on
        from where the one before came to.

        Args:
            most_trials: never try more, from 1 on.
        """
        places = [0] * len(self.knobs)
        for price in TRADE_OFFS:
            for _ in range(PASSES):
                before = list(places)
                for index in range(len(self.knobs)):
                    turned = self._turned(places, index, most_trials)
                    places = min(turned, key=lambda p: self._regret(p, price))
                if places == before:
                    break

    def _turned(self, places: list[int], index: int, most_trials: int) -> Iterator[list[int]]:
        """One knob at each of its places, as far as further trials are allowed."""
        for place in range(len(self.knobs[index].settings)):
            turned = [*places[:index], place, *places[index + 1 :]]
            if tuple(turned) in self.tried or len(self.tried) < most_trials:
                yield turned

    def _regret(self, places: list[int], price: float) -> float:
        full, trial = self.trial([0] * len(places)), self.trial(places)
        return loss_of(trial, full) + price * trial.work


def loss_of(trial: Outcome, full: Outcome) -> float:
    """What a trial loses, in percent points: AP, and well-placed objects that are not found.

    AP that is won by chance does not pay for objects that are lost.
    """
    drop = full.figures["AP"] - trial.figures["AP"]
    lost = 100 * float((trial.lost_well_placed + trial.lost).mean()) / 2
    return max(drop, 0.0) + lost


def exit_parameters(
    *,
    num_stages: int,
    objectness: npt.NDArray[np.float32],
    proposals_per_image: int,
    learned: Sequence[str] = (),
) -> list[Parameter]:
    """The knobs that a search turns.

    Args:
        num_stages: S.
        objectness: float32 ``[R]`` in [0, 1], of the proposals of the images to search on.
        proposals_per_image: the most of them.
        learned: learned parts that the model has.
    """
    gates = num_stages - 1
    objectness_knob = [{"PROPOSAL_THRESHOLD": value} for value in _thresholds(objectness)]
    first, later = ([n for n in m if n < proposals_per_image] for m in (_PROPOSALS, _REGIONS))
    knobs = [
        Parameter("redundancy", ({}, *({"REDUNDANCY_IOU": v} for v in _REDUNDANCY))),
        *(
            Parameter(
                f"pruning after stage {s}", _places("PRUNE_THRESHOLDS", _PRUNE, s, gates, 0.0)
            )
            for s in range(gates)
        ),
        Parameter("objectness", ({}, *objectness_knob)),
        Parameter("proposals", _places("REGION_BUDGET", first, 0, num_stages, 0)),
        *(
            Parameter(f"regions in stage {s}", _places("REGION_BUDGET", later, s, num_stages, 0))
            for s in range(1, num_stages)
        ),
    ]
    if "pruner" in learned:
        knobs += [
            Parameter(
                f"pruner at gate {g}", _places("PRUNER_THRESHOLDS", _PRUNER, g, num_stages, 0.0)
            )
            for g in range(num_stages)
        ]
    localisation = "predicted_iou" if "iou_head" in learned else "refinement"
    accepted = [
        {
            "CONFIDENCE": "learned" if "gate" in learned else "max_prob",
            "THRESHOLDS": (t,) * gates,
            "LOCALISATION": localisation,
            "LOCALISATION_THRESHOLDS": (iou,) * gates,
        }
        for t, iou in _ACCEPT
    ]
    return [*knobs, Parameter("acceptance", ({}, *accepted))]


def usual_settings(num_stages: int, learned: Sequence[str] = ()) -> dict[str, Setting]:
    """Each exit rule alone, at a usual value: what it buys by itself.

    Args:
        num_stages: S.
        learned: learned parts that the model has.
    """
    gates = num_stages - 1
    accepted = {"LOCALISATION": "refinement", "LOCALISATION_THRESHOLDS": (0.9,) * gates}
    # The last threshold that agreement can reach: all stages so far.
    patience = tuple(float(max(gate, 1)) for gate in range(gates))
    settings: dict[str, Setting] = {
        "prune < 0.02": {"PRUNE_THRESHOLDS": (0.02,) * gates},
        "prune 0.5 below 50th": {
            "PRUNE_MARGINS": (1.0, *(0.5,) * gates),
            "PRUNE_BEST": 50,
        },
        "redundant at 0.9": {"REDUNDANCY_IOU": 0.9},
        "redundant at 0.8": {"REDUNDANCY_IOU": 0.8},
        "prune and redundant": {"PRUNE_THRESHOLDS": (0.02,) * gates, "REDUNDANCY_IOU": 0.9},
        "accept max_prob 0.9": {"THRESHOLDS": (0.9,) * gates},
        "accept max_prob, box done": {"THRESHOLDS": (0.9,) * gates, **accepted},
        "accept entropy, box done": {
            "THRESHOLDS": (0.7,) * gates,
            "CONFIDENCE": "entropy",
            **accepted,
        },
        "accept margin, box done": {
            "THRESHOLDS": (0.8,) * gates,
            "CONFIDENCE": "margin",
            **accepted,
        },
        "accept agreement, box done": {
            "THRESHOLDS": patience,
            "CONFIDENCE": "agreement",
            **accepted,
        },
    }
    if "pruner" in learned:
        settings["learned pruner 0.1"] = {"PRUNER_THRESHOLDS": (0.1,) * num_stages}
    if "gate" in learned:
        settings["accept learned gate"] = {"THRESHOLDS": (0.6,) * gates, "CONFIDENCE": "learned"}
    if "iou_head" in learned:
        settings["accept max_prob, predicted IoU"] = {
            "THRESHOLDS": (0.9,) * gates,
            "LOCALISATION": "predicted_iou",
            "LOCALISATION_THRESHOLDS": (0.85,) * gates,
        }
    return settings


_REDUNDANCY = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
_PRUNE = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12)
_SHARES = (0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9)
_PROPOSALS = (500, 300, 200, 100, 50)
_REGIONS = (200, 150, 120, 100, 70, 50, 30)
_PRUNER = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_ACCEPT = (
    *((0.95, 0.95), (0.9, 0.95), (0.9, 0.92), (0.8, 0.92), (0.9, 0.9), (0.8, 0.9)),
    *((0.9, 0.85), (0.8, 0.85), (0.8, 0.8), (0.7, 0.7), (0.7, 0.0)),
)


def _thresholds(objectness: npt.NDArray[np.float32]) -> list[float]:
    """What drops these shares of the proposals, short of none and of all."""
    if len(objectness) == 0:
        return []
    rounded = [float(f"{value:.4g}") for value in np.quantile(objectness, _SHARES)]
    return [value for value in dict.fromkeys(rounded) if objectness.min() < value < 1]


def _places(
    key: str, values: Sequence[float], place: int, length: int, off: float
) -> tuple[Setting, ...]:
    """One place of a tuple, the others of which are off."""
    tuples = (tuple(v if i == place else off for i in range(length)) for v in values)
    return ({}, *({key: value} for value in tuples))


def _overlay(a: Any, b: Any) -> Any:
    return tuple(max(pair) for pair in zip(a, b, strict=True))


def pareto(
    trials: Mapping[tuple[int, ...], Outcome], cost: Callable[[Outcome], float]
) -> list[Any]:
    """Keys of the trials that none beats in AP or cost without being worse in the other.

    By falling AP, which is by falling cost.
    """
    rated = [(-t.figures["AP"], cost(t), key) for key, t in trials.items()]
    front: list[Any] = []
    cheapest = float("inf")
    for _, price, key in sorted(rated, key=lambda row: row[:2]):
        if price < cheapest:
            front.append(key)
            cheapest = price
    return front
