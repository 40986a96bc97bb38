"""What every region of some images saw at every stage of the full cascade.

Exit rules are tried on a record without the network: ``StageRunner`` takes the same steps, and the
record hands it what a network would compute. N images, R regions of all of them, S stages,
K foreground classes. Boxes are float32 XYXY in pixels of the resized images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cascade_det.core.ensemble import ScoreEnsemble
from cascade_det.core.exits import ExitPolicy, RegionView
from cascade_det.core.postprocess import select_reported
from cascade_det.core.regions import Regions, ReportedRegions, StageResult
from cascade_det.core.stage_runner import StageRunner
from cascade_det.core.structures import CascadeStats, Detections
from cascade_det.core.structures.boxes import image_bounds


@dataclass
class RecordedStage:
    """One stage; row *i* is the same region at every stage.

    Attributes:
        boxes: float32 ``[R, 4]``, as it refined them.
        decoded: all boxes that it predicts, ``[R, 4]`` or ``[R, 4 K]``.
        total: ``[R, K + 1]``, state of the score ensemble.
        agreements: int64 ``[R]``, how many stages before had the same most probable class up to
            there, in a row.
        predicted_ious: float32 ``[R]``; ``None`` without a head for them.
        reported: ``[R, K + 1]``, what a region is reported with that leaves here; ``None`` where
            the state of the ensemble says so.
        hidden: ``[R, F]`` of the box head, where they were asked for.
    """

    boxes: Tensor
    decoded: Tensor
    total: Tensor
    agreements: Tensor
    predicted_ious: Tensor | None = None
    reported: Tensor | None = None
    hidden: Tensor | None = None


@dataclass
class Replay:
    """What a cascade with exits would have done.

    Attributes:
        scored: what is reported of the regions, for ``CascadeRecord.select``.
        stats: of all images together.
        entered: int64 ``[S, N]``, regions of each image that enter each stage.
    """

    scored: list[ReportedRegions]
    stats: CascadeStats
    entered: Tensor


@dataclass
class CascadeRecord:
    """The full cascade on some images.

    Attributes:
        image_sizes: N ``(height, width)``.
        image_index: int64 ``[R]``, rising.
        proposals: float32 ``[R, 4]``.
        objectness: float32 ``[R]``, logits.
        crops: float32 ``[R, C]``, one feature vector for each proposal, or ``None``.
        stages: S stages.
        ensemble: how the stages' opinions become one score.
        score_thresh: of detections.
        nms_thresh: likewise.
        detections_per_image: likewise.
    """

    image_sizes: list[tuple[int, int]]
    image_index: Tensor
    proposals: Tensor
    objectness: Tensor
    crops: Tensor | None
    stages: list[RecordedStage]
    ensemble: ScoreEnsemble
    score_thresh: float
    nms_thresh: float
    detections_per_image: int

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.image_sizes)

    @property
    def num_stages(self) -> int:
        """S."""
        return len(self.stages)

    def cpu(self) -> CascadeRecord:
        """The same on the CPU."""

        def move(part: Any) -> dict[str, Any]:
            return {n: x.cpu() if isinstance(x, Tensor) else x for n, x in vars(part).items()}

        stages = [RecordedStage(**move(stage)) for stage in self.stages]
        return CascadeRecord(**{**move(self), "stages": stages})

    def of_images(self, images: Sequence[int]) -> CascadeRecord:
        """The record of some of the images, in the given order."""
        counts = torch.bincount(self.image_index, minlength=self.num_images).tolist()
        rows_of = torch.arange(len(self.proposals)).split(counts)
        chosen = [rows_of[image] for image in images]
        rows = torch.cat([*chosen, torch.zeros(0, dtype=torch.int64)])

        def pick(part: Any) -> dict[str, Any]:
            return {n: x[rows] if isinstance(x, Tensor) else x for n, x in vars(part).items()}

        lengths = torch.tensor([len(one) for one in chosen], dtype=torch.int64)
        fields = pick(self) | {
            "image_sizes": [self.image_sizes[image] for image in images],
            "image_index": torch.arange(len(chosen)).repeat_interleave(lengths),
            "stages": [RecordedStage(**pick(stage)) for stage in self.stages],
        }
        return CascadeRecord(**fields)

    def start(self) -> Regions:
        """All regions, before stage 0."""
        limits = image_bounds(self.image_sizes, self.image_index)
        rows = torch.arange(len(self.proposals), device=self.proposals.device)
        return Regions(self.proposals, self.image_index, limits, self.objectness, rows)

    def view(self, stage: int) -> RegionView:
        """What exit rules see after ``stage`` (-1: before the first) where nobody left."""
        before = self.proposals if stage < 1 else self.stages[stage - 1].boxes
        if stage < 0:
            return RegionView(
                stage=stage,
                num_images=self.num_images,
                image_index=self.image_index,
                boxes=self.proposals,
                objectness=self.objectness,
                crops=self.crops,
            )
        of_stage = self.stages[stage]
        return RegionView(
            stage=stage,
            num_images=self.num_images,
            image_index=self.image_index,
            boxes=of_stage.boxes,
            objectness=self.objectness,
            boxes_before=before,
            probs=self.ensemble.probs(of_stage.total, stage + 1),
            agreements=of_stage.agreements,
            predicted_ious=of_stage.predicted_ious,
        )

    def run_stage(self, regions: Regions, stage: int) -> StageResult:
        """The outcome of a stage for some of the regions."""
        of_stage, rows = self.stages[stage], regions.rows
        ious = of_stage.predicted_ious
        refined = Regions(
            of_stage.boxes[rows],
            regions.image_index,
            regions.limits,
            regions.objectness,
            rows,
            boxes_before=regions.boxes,
            total=of_stage.total[rows],
            agreements=of_stage.agreements[rows],
            predicted_ious=None if ious is None else ious[rows],
        )
        return StageResult(refined, of_stage.decoded[rows])

    def reported(self, run: StageResult, stage: int) -> Tensor:
        """Class probabilities ``[R, K + 1]`` of regions that leave after ``stage``."""
        reported = self.stages[stage].reported
        if reported is not None:
            return reported[run.regions.rows]
        return self.ensemble.probs(run.regions.total, stage + 1)

    def recorded_crops(self, regions: Regions) -> Tensor:
        """The crops ``[R, C]`` of some of the proposals.

        Raises:
            ValueError: none were recorded.
        """
        if self.crops is None:
            raise ValueError("the record has no crops: record with a policy that asks for them")
        return self.crops[regions.rows]

    def replay(self, policy: ExitPolicy | None, num_stages: int | None = None) -> Replay:
        """What a cascade with these exits would do.

        Args:
            policy: its exits, of which time budgets have no meaning here.
            num_stages: of the cascade, if it stops before the last one.
        """
        source = _Source(self)
        runner = StageRunner(
            source,
            num_stages=num_stages or self.num_stages,
            ensemble=self.ensemble,
            policy=policy,
        )
        scored = runner.run(self.start())
        return Replay(scored, runner.stats, source.entered)

    def select(self, scored: Sequence[ReportedRegions]) -> list[Detections]:
        """Detections of every image, in pixels of the resized ones."""
        if not scored:  # no proposal entered stage 0
            last, none = self.stages[-1], self.image_index[:0]
            scored = [ReportedRegions(last.decoded[:0], last.total[:0], none, none, none)]
        return select_reported(
            scored,
            self.num_images,
            score_thresh=self.score_thresh,
            nms_thresh=self.nms_thresh,
            detections_per_image=self.detections_per_image,
        )


class _Source:
    """A record in the place of a network."""

    def __init__(self, record: CascadeRecord) -> None:
        self.num_images = record.num_images
        self.reported, self.crops = record.reported, record.recorded_crops
        self.entered = record.image_index.new_zeros(record.num_stages, record.num_images)
        self._record = record

    def run_stage(self, regions: Regions, stage: int) -> StageResult:
        self.entered[stage] = torch.bincount(regions.image_index, minlength=self.num_images)
        return self._record.run_stage(regions, stage)


def join_records(records: Sequence[CascadeRecord]) -> CascadeRecord:
    """One record of the images of several, in order, with what all of them have.

    Raises:
        ValueError: there is none.
    """
    if not records:
        raise ValueError("no records to join")
    first = records[0]
    shifts = [0]
    for record in records:
        shifts.append(shifts[-1] + record.num_images)
    pairs = zip(records, shifts, strict=False)
    stages = [
        RecordedStage(**_join([vars(record.stages[stage]) for record in records]))
        for stage in range(first.num_stages)
    ]
    names = ("proposals", "objectness", "crops")
    return CascadeRecord(
        image_sizes=[size for record in records for size in record.image_sizes],
        image_index=torch.cat([record.image_index + shift for record, shift in pairs]),
        stages=stages,
        ensemble=first.ensemble,
        score_thresh=first.score_thresh,
        nms_thresh=first.nms_thresh,
        detections_per_image=first.detections_per_image,
        **_join([{name: getattr(record, name) for name in names} for record in records]),
    )


def _join(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        joined[name] = None if any(v is None for v in values) else torch.cat(values)
    return joined
