"""The way of regions through the stages: computed by a network, or replayed from a record.

Both take the same steps, so that what is decided for a record is what a real run does.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from cascade_det.core.ensemble import ScoreEnsemble
from cascade_det.core.exits import BEFORE_STAGES, KEPT, Accepted, ExitPolicy, RegionView
from cascade_det.core.exits.budget import Deadline
from cascade_det.core.regions import Regions, ReportedRegions, StageResult
from cascade_det.core.structures import CascadeStats, PartTimer


class StageSource(Protocol):
    """Where the outcome of a stage comes from."""

    num_images: int

    def run_stage(self, regions: Regions, stage: int) -> StageResult:
        """The outcome of a stage for the regions that enter it."""

    def reported(self, run: StageResult, stage: int) -> Tensor:
        """Class probabilities ``[R, K + 1]`` of regions that leave after ``stage``."""

    def crops(self, regions: Regions) -> Tensor:
        """One feature vector for each proposal, ``[R, C]``."""


class StageRunner:
    """Leads regions through the stages, and lets them out as a policy says; for one call.

    Args:
        source: of the outcomes.
        num_stages: S.
        ensemble: how the stages' opinions become one score.
        policy: who leaves early; ``None`` for nobody.
        deadline: of the call, where the policy has a time budget that is to count.
        timer: takes the milliseconds of ``stage<s>`` if given.
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
        self.deadline = deadline
        self.timer = timer
        self.stats = CascadeStats.of_nothing(num_stages)
        self._scored: list[ReportedRegions] = []
        self._accepted: list[RegionView] = []
        self._confidence: list[tuple[int, str, Tensor]] = []

    def run(self, proposals: Regions) -> list[ReportedRegions]:
        """All stages, or as many as any region needs; what is to be reported of the regions."""
        self.stats.proposed = len(proposals)
        with part(self.timer, "stage0"):
            live = self._admit(proposals)
        for stage in range(self.num_stages):
            # A tracer would leave the stages out for all inputs.
            if len(live) == 0 and not torch.jit.is_tracing():
                break
            self.stats.entered[stage] = len(live)
            with part(self.timer, f"stage{stage}"):
                run = self.source.run_stage(live, stage)
                live = self._let_out(run, stage)
        self._sum_up()
        return self._scored

    def _admit(self, proposals: Regions) -> Regions:
        """The proposals that enter stage 0."""
        policy = self.policy
        # Who leaves depends on the input: a tracer could not record it.
        if policy is None or torch.jit.is_tracing():
            return proposals
        view = RegionView(
            stage=BEFORE_STAGES,
            num_images=self.source.num_images,
            image_index=proposals.image_index,
            boxes=proposals.boxes,
            objectness=proposals.objectness,
            rows=proposals.rows,
            crops=self.source.crops(proposals) if policy.asks_for_crops else None,
        )
        decision = policy.decide(view, self.deadline)
        self.stats.left_before = {reason: len(rows) for reason, rows in decision.left.items()}
        return proposals if decision.stay is None else proposals[decision.stay]

    def _let_out(self, run: StageResult, stage: int) -> Regions:
        """Those that go on after a stage; the others are taken down."""
        live = run.regions
        if stage == self.num_stages - 1:
            self._take_down(run, stage)
            self.stats.left[stage] = {"completed": len(live)}
            if self.policy is not None and not torch.jit.is_tracing():
                self._confidence.append((stage, "completed", self._view(live, stage).scores.sum()))
            return live[:0]
        if self.policy is None or torch.jit.is_tracing():
            return live
        view = self._view(live, stage)
        decision = self.policy.decide(view, self.deadline)
        self.stats.left[stage] = {reason: len(rows) for reason, rows in decision.left.items()}
        for reason, rows in decision.left.items():
            self._confidence.append((stage, reason, view.scores[rows].sum()))
        kept = [decision.left[reason] for reason in KEPT if reason in decision.left]
        if kept:
            # Crops are many numbers for each region: they are gathered only where they are used.
            self._take_down(run[torch.cat(kept)], stage)
        if "confident" in decision.left and self.policy.asks_for_accepted:
            self._accepted.append(view[decision.left["confident"]])
        return live if decision.stay is None else live[decision.stay]

    def _view(self, live: Regions, stage: int) -> RegionView:
        return RegionView(
            stage=stage,
            num_images=self.source.num_images,
            image_index=live.image_index,
            boxes=live.boxes,
            objectness=live.objectness,
            rows=live.rows,
            boxes_before=live.boxes_before,
            probs=self.ensemble.probs(live.total, stage + 1),
            agreements=live.agreements,
            predicted_ious=live.predicted_ious,
            accepted=Accepted.of(self._accepted),
        )

    def _take_down(self, run: StageResult, stage: int) -> None:
        """Regions that are reported as they are now."""
        probs = self.source.reported(run, stage)
        if self.policy is not None:
            probs = self.policy.calibrated(probs, stage)
        self._scored.append(run.scored(probs, stage))

    def _sum_up(self) -> None:
        """Sums of scores, which stayed on the device until here, in one transfer."""
        if self._confidence:
            sums = torch.stack([total for _, _, total in self._confidence]).tolist()
            self.stats.confidence = [{} for _ in range(self.num_stages)]
            for (stage, reason, _), total in zip(self._confidence, sums, strict=True):
                self.stats.confidence[stage][reason] = total


def part(timer: PartTimer | None, name: str) -> AbstractContextManager[None]:
    """Within the block the timer, if there is one, counts time as that of ``name``."""
    return nullcontext() if timer is None else timer.part(name)
