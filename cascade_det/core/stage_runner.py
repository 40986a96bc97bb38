"""Runs the stages of a cascade and applies the exit policy before the first and after each.

The stages are computed by a network or replayed from a record; both take the same path here, so a
replay decides what a real run decides.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from cascade_det.core.ensemble import ScoreEnsemble
from cascade_det.core.exits import (
    BEFORE_STAGES,
    REPORTED_REASONS,
    Accepted,
    ExitPolicy,
    RegionView,
)
from cascade_det.core.exits.budget import Deadline
from cascade_det.core.regions import Regions, ReportedRegions, StageResult
from cascade_det.core.structures import CascadeStats, PartTimer


class StageSource(Protocol):
    """Computes or replays the stages."""

    num_images: int

    def run_stage(self, regions: Regions, stage: int) -> StageResult:
        """Run one stage on the regions that enter it."""

    def final_probs(self, result: StageResult, stage: int) -> Tensor:
        """Class probabilities ``[R, K + 1]`` of regions that exit after ``stage``."""

    def crops(self, regions: Regions) -> Tensor:
        """One feature vector per proposal: ``[R, C]``."""


class StageRunner:
    """One pass of a batch through the stages.

    Args:
        source: computes or replays the stages.
        num_stages: S.
        ensemble: combines the class scores of the stages.
        policy: the exits; ``None`` runs every stage on every region.
        deadline: of this call, if its time budget applies.
        timer: takes the milliseconds of ``stage<s>`` if given.

    Attributes:
        stats: counts of this call, complete after ``run``.
    """

    def __init__(
        self,
        source: StageSource,
        *,
        num_stages: int,
        ensemble: ScoreEnsemble,
        policy: ExitPolicy | None,
        deadline: Deadline | None = None,
        timer: PartTimer | None = None,
    ) -> None:
        self.source = source
        self.num_stages = num_stages
        self.ensemble = ensemble
        self.policy = policy
        # Exits depend on the input, which a tracer cannot record.
        self.exits = None if torch.jit.is_tracing() else policy
        self.deadline = deadline
        self.timer = timer
        self.stats = CascadeStats.empty(num_stages)
        self._reported: list[ReportedRegions] = []
        self._accepted: list[RegionView] = []
        self._score_sums: list[tuple[int, str, Tensor]] = []

    def run(self, proposals: Regions) -> list[ReportedRegions]:
        """Run the stages until no region is live; returns the regions to report."""
        self.stats.proposed = len(proposals)
        with part(self.timer, "stage0"):
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
        return self._reported

    def _apply_proposal_exits(self, proposals: Regions) -> Regions:
        """The proposals that enter stage 0."""
        if self.exits is None:
            return proposals
        view = RegionView(
            stage=BEFORE_STAGES,
            num_images=self.source.num_images,
            image_index=proposals.image_index,
            boxes=proposals.boxes,
            objectness=proposals.objectness,
            proposal_index=proposals.proposal_index,
            crops=self.source.crops(proposals) if self.exits.needs_crops else None,
        )
        decision = self.exits.decide(view, self.deadline)
        self.stats.left_before = {reason: len(rows) for reason, rows in decision.exited.items()}
        return proposals if decision.kept is None else proposals[decision.kept]

    def _apply_exits(self, result: StageResult, stage: int) -> Regions:
        """The regions that enter the next stage; exits are reported or dropped."""
        live = result.regions
        if stage == self.num_stages - 1:
            self._report(result, stage)
            self.stats.left[stage] = {"completed": len(live)}
            if self.exits is not None:
                self._score_sums.append((stage, "completed", self._view(live, stage).scores.sum()))
            return live[:0]
        if self.exits is None:
            return live
        view = self._view(live, stage)
        decision = self.exits.decide(view, self.deadline)
        exited = decision.exited
        self.stats.left[stage] = {reason: len(rows) for reason, rows in exited.items()}
        for reason, rows in exited.items():
            self._score_sums.append((stage, reason, view.scores[rows].sum()))
        reported = [exited[reason] for reason in REPORTED_REASONS if reason in exited]
        if reported:
            # Indexing copies the crops, which are large: only where regions are reported.
            self._report(result[torch.cat(reported)], stage)
        if "confident" in exited and self.exits.needs_accepted:
            self._accepted.append(view[exited["confident"]])
        return live if decision.kept is None else live[decision.kept]

    def _view(self, live: Regions, stage: int) -> RegionView:
        return RegionView(
            stage=stage,
            num_images=self.source.num_images,
            image_index=live.image_index,
            boxes=live.boxes,
            objectness=live.objectness,
            proposal_index=live.proposal_index,
            boxes_before=live.boxes_before,
            probs=self.ensemble.probs(live.score_state, stage + 1),
            agreements=live.agreements,
            predicted_ious=live.predicted_ious,
            accepted=Accepted.from_views(self._accepted),
        )

    def _report(self, result: StageResult, stage: int) -> None:
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


def part(timer: PartTimer | None, name: str) -> AbstractContextManager[None]:
    """``timer.part(name)``, or an empty context without a timer."""
    return nullcontext() if timer is None else timer.part(name)
