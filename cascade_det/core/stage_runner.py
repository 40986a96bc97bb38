"""Runs the stages of a cascade and applies the exit policy before the first and after each.

The stages are computed by a network or replayed from a record; both take the same path here, so a
replay decides what a real run decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cascade_det.core.ensemble import ScoreEnsemble
from cascade_det.core.exits import BEFORE_STAGES, REPORTED_REASONS, ExitPolicy, RegionView
from cascade_det.core.exits.budget import Deadline
from cascade_det.core.regions import Regions, ReportedRegions, StageResult
from cascade_det.core.structures import CascadeStats, PartTimer, part
from cascade_det.core.structures.on_device import take_rows


class StageSource(Protocol):
    """Computes or replays the stages."""

    @property
    def num_images(self) -> int:
        """N."""

    def run_stage(self, regions: Regions, stage: int) -> StageResult:
        """Run one stage on the regions that enter it."""

    def final_probs(self, result: StageResult, stage: int) -> Tensor:
        """Class probabilities ``[R, K + 1]`` of regions that exit after ``stage``."""

    def crops(self, regions: Regions) -> Tensor:
        """One feature vector per proposal: ``[R, C]``."""


@dataclass
class StageRunner:
    """One pass of a batch through the stages.

    Args:
        source: computes or replays the stages.
        num_stages: S.
        ensemble: combines the class scores of the stages.
        policy: the exits; ``None`` runs every stage on every region.
        deadline: of this call, if its time budget applies.
        timer: takes the milliseconds of ``stage<s>``, and of the exits in ``gate<g>``, if given:
            gate 0 is before stage 0, gate s + 1 after stage s.

    Attributes:
        stats: counts of this call, complete after ``run``.
    """

    source: StageSource
    num_stages: int
    ensemble: ScoreEnsemble
    policy: ExitPolicy | None
    deadline: Deadline | None = None
    timer: PartTimer | None = None

    def __post_init__(self) -> None:
        self.stats = CascadeStats.empty(self.num_stages)
        # Exits depend on the input, which a tracer cannot record.
        self.exits = None if torch.jit.is_tracing() else self.policy
        self._reported: list[ReportedRegions] = []
        self._accepted: list[RegionView] = []
        self._score_sums: list[tuple[int, str, Tensor]] = []

    def run(self, proposals: Regions) -> list[ReportedRegions]:
        """Run the stages until no region is live; returns at least one batch of regions."""
        self.stats.proposed = len(proposals)
        live = self._apply_proposal_exits(proposals)
        for stage in range(self.num_stages):
            # A trace must contain all stages, for inputs with live regions.
            if len(live) == 0 and not torch.jit.is_tracing():
                break
            self.stats.entered[stage] = len(live)
            with part(self.timer, f"stage{stage}"):
                result = self.source.run_stage(live, stage)
            live = self._apply_exits(result, stage)
        self._store_score_sums()
        if not self._reported:  # no proposal entered stage 0
            none = proposals.image_index[:0]
            probs = proposals.boxes.new_zeros(0, 1)
            self._reported = [ReportedRegions(proposals.boxes[:0], probs, none, none, none)]
        return self._reported

    def _apply_proposal_exits(self, proposals: Regions) -> Regions:
        """The proposals that enter stage 0."""
        if not self._has_gate(BEFORE_STAGES):
            return proposals
        assert self.exits is not None
        with part(self.timer, "gate0"):
            crops = self.source.crops(proposals) if self.exits.needs_crops else None
            view = proposals.view(BEFORE_STAGES, self.source.num_images, crops=crops)
            decision = self.exits.decide(view, self.deadline)
            self.stats.left_before = {reason: len(rows) for reason, rows in decision.exited.items()}
            return proposals.entering(decision.kept, decision.sizes)

    def _apply_exits(self, result: StageResult, stage: int) -> Regions:
        """The regions that enter the next stage; exits are reported or dropped."""
        live = result.regions
        if stage == self.num_stages - 1:
            self._report(result, stage)
            self.stats.left[stage] = {"completed": len(live)}
            if self.exits is not None:
                self._score_sums.append((stage, "completed", self._view(live, stage).scores.sum()))
            return live[:0]
        if not self._has_gate(stage):
            return live
        assert self.exits is not None
        with part(self.timer, f"gate{stage + 1}"):
            view = self._view(live, stage)
            decision = self.exits.decide(view, self.deadline)
            exited = decision.exited
            self.stats.left[stage] = {reason: len(rows) for reason, rows in exited.items()}
            for reason, rows in exited.items():
                self._score_sums.append((stage, reason, take_rows(view.scores, rows).sum()))
            if "confident" in exited and self.exits.needs_accepted:
                self._accepted.append(view.boxes_of(exited["confident"]))
            entering = live.entering(decision.kept, decision.sizes)
        reported = [exited[reason] for reason in REPORTED_REASONS if reason in exited]
        if reported:
            # Indexing copies the crops, which are large: only where regions are reported.
            self._report(result.exiting(torch.cat(reported)), stage)
        return entering

    def _has_gate(self, stage: int) -> bool:
        """Whether any rule, or the clock, may end regions after ``stage``."""
        exits = self.exits
        return exits is not None and (self.deadline is not None or exits.has_gate(stage))

    def _view(self, live: Regions, stage: int) -> RegionView:
        probs = self.ensemble.probs(live.score_state, stage + 1)
        accepted = tuple(self._accepted)
        return live.view(stage, self.source.num_images, probs=probs, accepted=accepted)

    def _report(self, result: StageResult, stage: int) -> None:
        with part(self.timer, f"stage{stage}"):  # some ensembles run heads once more
            probs = self.source.final_probs(result, stage)  # [R, K + 1]
            if self.policy is not None:
                probs = self.policy.calibrated(probs, stage)
            self._reported.append(result.reported(probs, stage))

    def _store_score_sums(self) -> None:
        """Fill ``stats.confidence``: all sums leave the device in one transfer."""
        if self._score_sums:
            sums = torch.stack([score_sum for _, _, score_sum in self._score_sums]).tolist()
            self.stats.confidence = [{} for _ in range(self.num_stages)]
            for (stage, reason, _), score_sum in zip(self._score_sums, sums, strict=True):
                self.stats.confidence[stage][reason] = score_sum
