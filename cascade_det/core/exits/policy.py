"""The exit policy: all exit rules, in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cascade_det.core.exits.background import KeepNearBest, PruneBelow
from cascade_det.core.exits.budget import Deadline, RegionBudget, TimeBudget
from cascade_det.core.exits.confidence import LOCALISATIONS, MEASURES, AcceptConfident
from cascade_det.core.exits.learned import LearnedParts
from cascade_det.core.exits.redundancy import DropCovered
from cascade_det.core.exits.view import BEFORE_STAGES, RegionView
from cascade_det.core.structures.on_device import indices_by_group
from cascade_det.layers.rpn_head import TileScorer

CONFIDENCES = (*MEASURES, "learned")
# Early exits for these reasons are reported; all others are dropped.
REPORTED_REASONS = ("confident", "budget")


class ExitRule(Protocol):
    """Selects the regions that exit for one reason."""

    reason: str

    def is_active(self, stage: int) -> bool:
        """Whether regions can exit after ``stage`` (-1: before stage 0)."""

    def exit_mask(self, view: RegionView) -> Tensor:
        """Bool ``[R]``: the regions that exit; anything for those that are gone."""


@dataclass
class Decision:
    """The outcome of a gate: int64 indices into the regions of its view.

    Attributes:
        kept: regions that enter the next stage, in order; ``None`` for all.
        exited: regions that exit, by reason; no entry is empty.
        sizes: N numbers of kept regions of each image, where the CPU knows them.
    """

    kept: Tensor | None
    exited: dict[str, Tensor]
    sizes: Sequence[int] | None = None


class ExitPolicy(nn.Module):
    """Decides which regions exit at each gate: before stage 0 and after each stage but the last.

    A region exits for the first reason that applies: background, redundant, confident, budget.
    Each rule sees the regions that the rules before it kept; the others are ``gone``. All rules
    are off by default. A policy keeps no state of a call, so threads may share it.

    Args:
        num_stages: S.
        thresholds: S - 1 confidences from which on a region is accepted.
        confidence: one of ``CONFIDENCES``.
        localisation: "none" or one of ``LOCALISATIONS``, a further condition of acceptance.
        localisation_thresholds: S - 1 values of it, each in [0, 1].
        prune_thresholds: S - 1 foreground probabilities, see ``PruneBelow``.
        proposal_threshold: the same for the objectness before stage 0.
        prune_margins: S values, before stage 0 and after each stage, see ``KeepNearBest``.
        prune_best: k of ``KeepNearBest``.
        pruner_thresholds: S values of ``LearnedParts.continue_probability``, before stage 0 and
            after each stage, below which a region is dropped; 0 is off.
        redundancy_iou: see ``DropCovered``; ``None`` is off.
        region_budget: S limits, see ``RegionBudget``.
        time_budget_ms: milliseconds of ``TimeBudget``; 0 is no limit.
        time_budget_per_image: see ``TimeBudget``.
        clock: see ``TimeBudget``.
        gates_off: gates at which the rules are not applied, but a time budget is: 0 is before
            stage 0, s + 1 after stage s. Regions that would exit there stay live.
        tile_threshold: from which objectness, or score of the ``tile_head``, on a tile of the
            finest map is open for the RPN, see ``cascade_det.layers.tile_gate``; 0 computes the
            whole map, 1 opens no tile.
        score_scales: S values a, by exit stage; regions are reported with the calibrated scores
            sigmoid(a logit(p) + b).
        score_shifts: S values b, by exit stage.
        learned: the learned parts that the rules use.

    Raises:
        ValueError: for a wrong number of values, a gate that is not there, or a rule without its
            learned part.
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
        gates_off: Collection[int] = (),
        tile_threshold: float = 0.0,
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
        self.gates_off = _checked_gates(gates_off, num_stages)
        self.tile_threshold = tile_threshold
        rules: list[ExitRule] = []
        if proposal_threshold > 0 or any(prune_thresholds):
            of_stages = prune_thresholds or (0.0,) * (num_stages - 1)
            rules.append(PruneBelow((proposal_threshold, *of_stages)))
        if any(margin < 1 for margin in prune_margins):
            rules.append(KeepNearBest(prune_margins, best=prune_best))
        if any(pruner_thresholds):
            pruner = self._part("pruner")
            rules.append(PruneBelow(pruner_thresholds, pruner.continue_probability))
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
        # Not among the rules: each call has a Deadline of its own.
        self.time_budget: TimeBudget | None = None
        if time_budget_ms > 0:
            self.time_budget = TimeBudget(
                time_budget_ms, per_image=time_budget_per_image, clock=clock
            )
        self.score_scales = tuple(score_scales)
        self.score_shifts = tuple(score_shifts)
        self.needs_crops = any(pruner_thresholds[:1]) and 0 not in self.gates_off
        # Learned parts read the objectness at every gate.
        uses_learned = any(pruner_thresholds) or (accepts and confidence == "learned")
        self.needs_objectness = uses_learned or self.has_gate(BEFORE_STAGES)
        self.needs_agreements = uses_learned or (accepts and confidence == "agreement")
        self.needs_accepted = redundancy_iou is not None and accepts

    @property
    def tile_scorer(self) -> TileScorer | None:
        """What opens tiles in place of objectness."""
        if self.learned is None or self.learned.tile_head is None:
            return None
        return self.learned.tile_head.probabilities

    def has_gate(self, stage: int) -> bool:
        """Whether any rule is on after ``stage`` (-1: before stage 0)."""
        return bool(self._rules_at(stage))

    def decide(self, view: RegionView, deadline: Deadline | None = None) -> Decision:
        """Decide which regions of ``view`` exit.

        Args:
            view: the live regions.
            deadline: of the call, applied last; ``None`` for none, as in a replay.
        """
        rules = self._rules_at(view.stage)
        if deadline is not None:
            rules.append(deadline)
        if not rules or not len(view):
            return Decision(None, {}, view.sizes)
        sizes = None
        if len(rules) == 1 and isinstance(rules[0], RegionBudget):
            sizes = rules[0].sizes_after(view)
            if sizes is not None and sum(sizes) == len(view):
                return Decision(None, {}, sizes)
        masks = [rules[0].exit_mask(view)]  # [R] each
        gone = masks[0]
        for rule in rules[1:]:
            masks.append(rule.exit_mask(view.without(gone)))
            gone = gone | masks[-1]
        # By the first rule that applies. The regions are split once, at the end, because a GPU
        # makes the CPU wait for every number of regions.
        first = torch.full_like(view.image_index, len(rules))
        for index in reversed(range(len(rules))):
            first.masked_fill_(masks[index], index)
        if sizes is None:
            *exiting, kept = indices_by_group(first, len(rules) + 1)
        else:
            rows = torch.argsort(first, stable=True)
            *exiting, kept = rows.split([len(view) - sum(sizes), sum(sizes)])
        exited: dict[str, Tensor] = {}
        for rule, rows in zip(rules, exiting, strict=True):
            if len(rows):
                before = exited.get(rule.reason)
                exited[rule.reason] = rows if before is None else torch.cat((before, rows))
        return Decision(kept if exited else None, exited, sizes if exited else view.sizes)

    def _rules_at(self, stage: int) -> list[ExitRule]:
        if stage + 1 in self.gates_off:
            return []
        return [rule for rule in self.rules if rule.is_active(stage)]

    def calibrated(self, probs: Tensor, stage: int) -> Tensor:
        """Calibrate class probabilities ``[R, K + 1]`` of regions that exit after ``stage``."""
        if not self.score_scales:
            return probs
        scale, shift = self.score_scales[stage], self.score_shifts[stage]
        if (scale, shift) == (1.0, 0.0):
            return probs
        foreground = torch.sigmoid(torch.logit(probs[:, :-1], eps=1e-6) * scale + shift)
        return torch.cat((foreground, probs[:, -1:]), dim=1)

    def _part(self, name: str) -> LearnedParts:
        if self.learned is None or name not in self.learned.names:
            raise ValueError(f"a rule needs the learned part {name!r}, which is missing")
        return self.learned

    def _localisation(self, name: str) -> Callable[[RegionView], Tensor] | None:
        if name == "none":
            return None
        if name == "predicted_iou":
            self._part("iou_head")
        return LOCALISATIONS[name]


def _checked_gates(gates: Collection[int], num_stages: int) -> frozenset[int]:
    if missing := sorted(set(gates) - set(range(num_stages))):
        raise ValueError(f"no gates {missing}: {num_stages} stages have 0 to {num_stages - 1}")
    return frozenset(gates)


def build_exits(
    arguments: Mapping[str, Any] | None,
    hidden_features: Sequence[int],
    crop_channels: int,
    tile_channels: int = 0,
) -> ExitPolicy | None:
    """Build a policy and its learned parts; ``None`` for ``None``.

    Args:
        arguments: of ``ExitPolicy``, with the names of the parts to build as ``learned``.
        hidden_features: S widths of the outputs of the box heads.
        crop_channels: C of the feature maps.
        tile_channels: of the RPN's hidden maps.
    """
    if arguments is None:
        return None
    learned = None
    if arguments["learned"]:
        learned = LearnedParts(
            names=arguments["learned"],
            num_stages=arguments["num_stages"],
            hidden_features=hidden_features,
            crop_channels=crop_channels,
            tile_channels=tile_channels,
        )
    return ExitPolicy(**{**arguments, "learned": learned})
