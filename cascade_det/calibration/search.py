"""Searches exits that save the most work for their loss.

A setting gives values to keys of ``MODEL.CASCADE.EXIT``; keys that it does not name are off. A
parameter is one key, or one element of a tuple; its levels are values from safe (off) to risky.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cascade_det.calibration.trials import TrialSummary

Setting = dict[str, Any]
# The level of each parameter.
Levels = tuple[int, ...]

# Percent points of loss that all of the work is worth: small values stay close to the full AP.
TRADE_OFFS = (0.05, 0.2, 0.8, 3.0, 12.0)
PASSES = 2


@dataclass
class Search:
    """Varies one parameter after another, and remembers every trial.

    Args:
        parameters: to vary, by name: a setting per level, from safe to risky. The first one is
            empty: it turns the parameter off.
        evaluate: tries a setting.
        metric: the AP to lose least of.
        on_trial: called after each new trial.

    Attributes:
        tried: trials by levels.
    """

    parameters: Mapping[str, Sequence[Setting]]
    evaluate: Callable[[Setting], TrialSummary]
    metric: str = "AP"
    on_trial: Callable[[], object] = lambda: None
    tried: dict[Levels, TrialSummary] = field(default_factory=dict)

    @property
    def full(self) -> Levels:
        """The levels of the full cascade: everything off."""
        return (0,) * len(self.parameters)

    def setting(self, levels: Sequence[int]) -> Setting:
        """All keys that the parameters set at these levels; tuples of several are overlaid."""
        merged: Setting = {}
        for settings, level in zip(self.parameters.values(), levels, strict=True):
            for key, value in settings[level].items():
                merged[key] = tuple(map(max, merged[key], value)) if key in merged else value
        return merged

    def trial(self, levels: Sequence[int]) -> TrialSummary:
        """The trial at these levels, run at most once."""
        key = tuple(levels)
        if key not in self.tried:
            self.tried[key] = self.evaluate(self.setting(levels))
            self.on_trial()
        return self.tried[key]

    def search(self, most_trials: int) -> None:
        """For each trade-off, set every parameter to its best level, in a few passes.

        Each trade-off starts from the result of the one before. The less work is worth, the closer
        the result is to the full cascade.

        Args:
            most_trials: the limit of trials, at least 1.
        """
        levels = list(self.full)
        for trade_off in TRADE_OFFS:
            for _ in range(PASSES):
                before = list(levels)
                for index, settings in enumerate(self.parameters.values()):
                    candidates = self._candidates(levels, index, len(settings), most_trials)
                    levels = min(candidates, key=lambda c: self._regret(c, trade_off))
                if levels == before:
                    break

    def _candidates(
        self, levels: list[int], index: int, num_levels: int, most_trials: int
    ) -> Iterator[list[int]]:
        """One parameter at each of its levels, as far as further trials are allowed."""
        for level in range(num_levels):
            candidate = [*levels[:index], level, *levels[index + 1 :]]
            if tuple(candidate) in self.tried or len(self.tried) < most_trials:
                yield candidate

    def _regret(self, levels: list[int], trade_off: float) -> float:
        full, trial = self.trial(self.full), self.trial(levels)
        return loss_of(trial, full, self.metric) + trade_off * trial.work


def loss_of(trial: TrialSummary, full: TrialSummary, metric: str = "AP") -> float:
    """The loss of a trial in percent points: AP, and well-placed objects that are not found.

    AP that rises by chance does not make up for lost objects.
    """
    drop = full.metrics[metric] - trial.metrics[metric]
    lost = 100 * float((trial.lost_well_placed + trial.lost).mean()) / 2
    return max(drop, 0.0) + lost
