"""When regions leave the cascade before its last stage: all rules together."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cascade_det.core.exits.background import KeepNearBest, PruneBelow
from cascade_det.core.exits.budget import Deadline, RegionBudget, TimeBudget
from cascade_det.core.exits.confidence import LOCALISATIONS, MEASURES, AcceptConfident
from cascade_det.core.exits.learned import LearnedParts, LearnedPruner
from cascade_det.core.exits.redundancy import DropCovered
from cascade_det.core.exits.view import BEFORE_STAGES, RegionView

CONFIDENCES = (*MEASURES, "learned")
# What leaves for these reasons is reported; the rest is dropped.
KEPT = ("confident", "budget")


class ExitRule(Protocol):
    """One cause to leave."""

    reason: str

    def is_active(self, stage: int) -> bool:
        """Whether anything may leave after ``stage`` (-1: before the first)."""

    def leaves(self, view: RegionView) -> Tensor:
        """Which of the regions leave: bool ``[R]``."""


@dataclass
class Decision:
    """Who leaves at a gate; int64 indices into the regions that were asked about.

    Attributes:
        stay: who goes on, in the order in which they came; ``None`` for everybody.
        left: who leaves, by reason; never empty.
    """

    stay: Tensor | None
    left: dict[str, Tensor]


class ExitPolicy(nn.Module):
    """Decides which regions leave at each gate: before stage 0, and after each but the last.

    A region leaves for the first reason that holds: background, redundant, confident, budget.
    Rules look at those that no rule before them took. What a rule would do by its default is
    nothing. A policy keeps nothing of the calls that use it: threads may share one.

    Args:
        num_stages: S.
        thresholds: S - 1 values of the confidence from which on a region is final.
        confidence: one of ``CONFIDENCES``.
        localisation: "none" or one of ``LOCALISATIONS``, which a confident region reaches too.
        localisation_thresholds: S - 1 values of it, each in [0, 1].
        prune_thresholds: S - 1 foreground probabilities, see ``PruneBelow``.
        proposal_threshold: the same for the objectness before stage 0.
        prune_margins: S values, before stage 0 and after each stage, see ``KeepNearBest``.
        prune_best: its k.
        pruner_thresholds: S values, see ``LearnedPruner``; 0 is never.
        redundancy_iou: see ``DropCovered``; ``None`` is never.
        region_budget: S numbers, see ``RegionBudget``.
        time_budget_ms: see ``TimeBudget``; 0 is no limit.
        time_budget_per_image: likewise.
        clock: likewise.
        score_scales: S values a of the calibration of the scores that a region which left after
            stage s is reported with: sigmoid(a logit(p) + b).
        score_shifts: S values b.
        learned: the parts that are trained, for the rules that use them.

    Raises:
        ValueError: values that differ in number, or a rule whose learned part is missing.
    """

    def __init__(
        self,
        *,
        num_stages: int,
        thresholds: Sequence[float] = (),
        confidence: str = "max_prob",
        localisation: str = "none",
        localisation_thresholds: Sequence[float] = (),
        prune_thresholds: Sequence[float] = (),
        proposal_threshold: float = 0.0,
        prune_margins: Sequence[float] = (),
        prune_best: int = 100,
        pruner_thresholds: Sequence[float] = (),
        redundancy_iou: float | None = None,
        region_budget: Sequence[int] = (),
        time_budget_ms: float = 0.0,
        time_budget_per_image: bool = True,
        clock: Callable[[], float] = time.perf_counter,
        score_scales: Sequence[float] = (),
        score_shifts: Sequence[float] = (),
        learned: LearnedParts | None = None,
    ) -> None:
        super().__init__()
        self.num_stages = num_stages
        self.learned = learned
        self.thresholds, self.prune_thresholds = tuple(thresholds), tuple(prune_thresholds)
        for name, values, count in (
            ("thresholds", thresholds, num_stages - 1),
            ("localisation thresholds", localisation_thresholds, num_stages - 1),
            ("prune thresholds", prune_thresholds, num_stages - 1),
            ("prune margins", prune_margins, num_stages),
            ("pruner thresholds", pruner_thresholds, num_stages),
            ("region budgets", region_budget, num_stages),
            ("score scales", score_scales, num_stages),
            ("score shifts", score_shifts, num_stages),
        ):
            if len(values) not in (0, count):
                raise ValueError(f"{len(values)} {name} for {num_stages} stages: give {count}")
        rules: list[ExitRule] = []
        if proposal_threshold > 0 or any(prune_thresholds):
            of_stages = prune_thresholds or (0.0,) * (num_stages - 1)
            rules.append(PruneBelow((proposal_threshold, *of_stages)))
        if any(margin < 1 for margin in prune_margins):
            rules.append(KeepNearBest(prune_margins, best=prune_best))
        if any(pruner_thresholds):
            rules.append(LearnedPruner(self._part("pruner"), pruner_thresholds))
        if redundancy_iou is not None:
            rules.append(DropCovered(redundancy_iou))
        # A probability above 1 is never reached; agreement counts stages.
        accepts = any(t <= 1 or confidence == "agreement" for t in thresholds)
        if accepts:
            rules.append(
                AcceptConfident(
                    self._part("gate").readiness
                    if confidence == "learned"
                    else MEASURES[confidence],
                    thresholds,
                    self._localisation(localisation),
                    localisation_thresholds,
                )
            )
        if any(region_budget):
            rules.append(RegionBudget(region_budget))
        self.rules = tuple(rules)
        # No rule: it has one for each call.
        self.time_budget: TimeBudget | None = None
        if time_budget_ms > 0:
            self.time_budget = TimeBudget(
                time_budget_ms, per_image=time_budget_per_image, clock=clock
            )
        self.score_scales = tuple(score_scales)
        self.score_shifts = tuple(score_shifts)
        self.asks_for_crops = any(pruner_thresholds[:1])
        # It is among the features of learned parts at every gate.
        uses_learned = any(pruner_thresholds) or (accepts and confidence == "learned")
        self.asks_for_objectness = uses_learned or any(
            rule.is_active(BEFORE_STAGES) for rule in self.rules
        )
        self.asks_for_agreements = uses_learned or (accepts and confidence == "agreement")
        self.asks_for_accepted = redundancy_iou is not None and accepts

    def decide(self, view: RegionView, deadline: Deadline | None = None) -> Decision:
        """Who leaves at the gate of ``view``.

        Args:
            view: of the regions that are still there.
            deadline: of the call, by ``time_budget``, the last reason to leave; ``None`` for none,
                as in a replay.
        """
        left: dict[str, Tensor] = {}
        stay: Tensor | None = None
        for rule in self.rules if deadline is None else (*self.rules, deadline):
            if not rule.is_active(view.stage) or not len(view):
                continue
            leaves = rule.leaves(view)
            # A stable sort keeps the order, and one count tells the lengths of both parts.
            staying, leaving = torch.argsort(leaves.byte(), stable=True).tensor_split(
                [len(view) - int(leaves.sum())]
            )
            if not len(leaving):
                continue
            rows = leaving if stay is None else stay[leaving]
            left[rule.reason] = (
                torch.cat((left[rule.reason], rows)) if rule.reason in left else rows
            )
            stay = staying if stay is None else stay[staying]
            view = view[staying]
        return Decision(stay, left)

    def calibrated(self, probs: Tensor, stage: int) -> Tensor:
        """The class probabilities ``[R, K + 1]`` that regions report which left after ``stage``."""
        if not self.score_scales:
            return probs
        scale, shift = self.score_scales[stage], self.score_shifts[stage]
        if (scale, shift) == (1.0, 0.0):
            return probs
        foreground = torch.sigmoid(torch.logit(probs[:, :-1], eps=1e-6) * scale + shift)
        return torch.cat((foreground, probs[:, -1:]), dim=1)

    def _part(self, name: str) -> LearnedParts:
        if self.learned is None or name not in self.learned.names:
            raise ValueError(f"a rule needs the learned part {name!r}, which is not there")
        return self.learned

    def _localisation(self, name: str) -> Callable[[RegionView], Tensor] | None:
        if name == "none":
            return None
        if name == "predicted_iou":
            self._part("iou_head")
        return LOCALISATIONS[name]


def build_exits(
    arguments: Mapping[str, Any] | None, hidden_features: Sequence[int], crop_channels: int
) -> ExitPolicy | None:
    """A policy with the learned parts that it wants; ``None`` for ``None``.

    Args:
        arguments: of ``ExitPolicy``, with the names of its parts under ``learned``.
        hidden_features: S widths of the outputs of the box heads.
        crop_channels: C of the feature maps.
    """
    if arguments is None:
        return None
    names = arguments["learned"]
    learned = None
    if names:
        learned = LearnedParts(
            names=names,
            num_stages=arguments["num_stages"],
            hidden_features=hidden_features,
            crop_channels=crop_channels if "pruner" in names else 0,
        )
    return ExitPolicy(**{**arguments, "learned": learned})
