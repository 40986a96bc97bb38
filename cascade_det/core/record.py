"""A recording of the full cascade: every region at every stage.

Exit rules are replayed on a record without the network: ``StageRunner`` takes the same path, and
the record returns what the network would compute. N images, R regions of all of them, S stages,
K foreground classes. Boxes are float32 XYXY in pixels of the resized images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cascade_det.core.ensemble import ScoreEnsemble
from cascade_det.core.exits import ExitPolicy, RegionView
from cascade_det.core.postprocess import Selection, select_detections
from cascade_det.core.recorded_tiles import TILE_WORK, TileProposals, TileUse, join_tiles
from cascade_det.core.regions import Regions, ReportedRegions, StageResult
from cascade_det.core.roi_pooling import RoIPooler
from cascade_det.core.stage_runner import StageRunner
from cascade_det.core.structures import CascadeStats, Detections
from cascade_det.core.structures.boxes import flatten_images


@dataclass
class RecordedStage:
    """One stage; row *i* is the same region at every stage.

    Attributes:
        boxes: float32 ``[R, 4]``, refined by the stage.
        decoded: float32 ``[R, 4]`` or ``[R, 4 K]``, all predicted boxes.
        score_state: float32 ``[R, K + 1]``, state of the score ensemble.
        agreements: int64 ``[R]``, number of consecutive stages before with the same top class.
        predicted_ious: float32 ``[R]`` in [0, 1]; ``None`` without an IoU head.
        final_probs: float32 ``[R, K + 1]``, for exits after this stage; ``None`` where
            ``score_state`` gives them.
        hidden: ``[R, F]``, outputs of the box head; ``None`` unless requested.
    """

    boxes: Tensor
    decoded: Tensor
    score_state: Tensor
    agreements: Tensor
    predicted_ious: Tensor | None = None
    final_probs: Tensor | None = None
    hidden: Tensor | None = None


@dataclass
class Replay:
    """Outcome of a cascade with exits, from a record.

    Attributes:
        reported: the regions to report, for ``CascadeRecord.select``.
        stats: counts over all images.
        entered: int64 ``[S, N]``, regions of each image that enter each stage.
        tile_use: of the finest map; ``None`` where no tile thresholds are recorded.
    """

    reported: list[ReportedRegions]
    stats: CascadeStats
    entered: Tensor
    tile_use: TileUse | None = None

    @property
    def tiles(self) -> Tensor:
        """Tiles of each image by ``TILE_WORK``, int64 ``[4, N]``."""
        if self.tile_use is None:
            return self.entered.new_zeros(len(TILE_WORK), self.entered.shape[1])
        return self.tile_use.work

    def read_masked(self, detections: Sequence[Detections], chosen: Sequence[Tensor]) -> None:
        """Count the tiles that masks of detections read.

        Args:
            detections: of each image, in pixels of the resized images.
            chosen: bool ``[D]`` of each image, the detections that get a mask.
        """
        if self.tile_use is not None:
            boxes = [d.boxes[own] for d, own in zip(detections, chosen, strict=True)]
            self.tile_use.read(*flatten_images(boxes))


@dataclass(kw_only=True)
class RecordedDetections(Detections):
    """Detections of one image from a record.

    Attributes:
        rows: int64 ``[D]``, the region of each in the record.
    """

    rows: Tensor


@dataclass
class CascadeRecord:
    """The full cascade on some images.

    Attributes:
        image_sizes: N ``(height, width)``.
        image_index: int64 ``[R]``, ascending.
        proposals: float32 ``[R, 4]``.
        objectness: float32 ``[R]``, logits.
        crops: float32 ``[R, C]``, one feature vector per proposal, or ``None``.
        stages: S stages.
        ensemble: combines the class scores of the stages.
        selection: which detections are reported.
        pooler: of the regions.
        pools_whole_maps: whether the pooler needs all tiles of the finest map.
        tiles: of some tile thresholds, whose proposals are recorded together; ``None`` for the
            proposals of the whole map alone.
    """

    image_sizes: list[tuple[int, int]]
    image_index: Tensor
    proposals: Tensor
    objectness: Tensor
    crops: Tensor | None
    stages: list[RecordedStage]
    ensemble: ScoreEnsemble
    selection: Selection
    pooler: RoIPooler | None = None
    pools_whole_maps: bool = False
    tiles: TileProposals | None = None

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.image_sizes)

    @property
    def num_stages(self) -> int:
        """S."""
        return len(self.stages)

    def cpu(self) -> CascadeRecord:
        """A copy on the CPU."""
        stages = [RecordedStage(**_map_tensors(Tensor.cpu, stage)) for stage in self.stages]
        tiles = None if self.tiles is None else self.tiles.cpu()
        fields = _map_tensors(Tensor.cpu, self)
        return CascadeRecord(**{**fields, "stages": stages, "tiles": tiles})

    def rows(self, tile_threshold: float = 0.0) -> Tensor:
        """The regions that are proposed at a tile threshold: int64, ascending.

        Raises:
            ValueError: the threshold was not recorded.
        """
        if self.tiles is not None:
            own = self.tiles.members[:, self.tiles.index(tile_threshold)]
            return torch.nonzero(own).squeeze(1)
        if tile_threshold > 0:
            raise ValueError(
                f"the tile threshold is {tile_threshold:g}, but the record has none: record a "
                "detector whose finest map can be computed in tiles, with its thresholds"
            )
        return torch.arange(len(self.proposals), device=self.proposals.device)

    def select_images(self, images: Sequence[int]) -> CascadeRecord:
        """The record of some of the images, in the given order."""
        counts = torch.bincount(self.image_index, minlength=self.num_images).tolist()
        rows_per_image = torch.arange(len(self.proposals)).split(counts)
        chosen = [rows_per_image[image] for image in images]
        rows = torch.cat([*chosen, torch.zeros(0, dtype=torch.int64)])

        def select(tensor: Tensor) -> Tensor:
            return tensor[rows]

        lengths = torch.tensor([len(one) for one in chosen], dtype=torch.int64)
        fields = _map_tensors(select, self) | {
            "image_sizes": [self.image_sizes[image] for image in images],
            "image_index": torch.arange(len(chosen)).repeat_interleave(lengths),
            "stages": [RecordedStage(**_map_tensors(select, stage)) for stage in self.stages],
            "tiles": None if self.tiles is None else self.tiles.select(rows, images),
        }
        return CascadeRecord(**fields)

    def view(self, stage: int) -> RegionView:
        """The input of exit rules after ``stage`` (-1: before stage 0), had no region exited."""
        regions = self._proposal_regions(0.0)
        if stage < 0:
            crops = None if self.crops is None else self.crops[regions.proposal_index]
            return regions.view(stage, self.num_images, crops=crops)
        if stage > 0:
            regions.boxes = self.stages[stage - 1].boxes[regions.proposal_index]
        regions = self.refine(regions, stage)
        probs = self.ensemble.probs(regions.score_state, stage + 1)
        return regions.view(stage, self.num_images, probs=probs)

    def refine(self, regions: Regions, stage: int) -> Regions:
        """The regions after ``stage``, from the regions that enter it."""
        recorded, rows = self.stages[stage], regions.proposal_index
        ious = recorded.predicted_ious
        return replace(
            regions,
            boxes=recorded.boxes[rows],
            boxes_before=regions.boxes,
            score_state=recorded.score_state[rows],
            agreements=recorded.agreements[rows],
            predicted_ious=None if ious is None else ious[rows],
        )

    def final_probs(self, stage: int, rows: Tensor | slice = slice(None)) -> Tensor:
        """Class probabilities ``[R, K + 1]`` of rows that exit after ``stage``."""
        recorded = self.stages[stage]
        if recorded.final_probs is not None:
            return recorded.final_probs[rows]
        return self.ensemble.probs(recorded.score_state[rows], stage + 1)

    def replay(self, policy: ExitPolicy | None, num_stages: int | None = None) -> Replay:
        """Run the recorded cascade with other exits.

        Args:
            policy: the exits; a time budget has no effect. ``None`` for none.
            num_stages: stop after so many stages; ``None`` runs all.

        Raises:
            ValueError: the policy needs crops, and the record has none; or its tile threshold was
                not recorded.
        """
        tile_threshold = 0.0 if policy is None else policy.tile_threshold
        proposals = self._proposal_regions(tile_threshold)
        source = _RecordSource(self, self._tile_use(tile_threshold))
        runner = StageRunner(
            source,
            num_stages=num_stages or self.num_stages,
            ensemble=self.ensemble,
            policy=policy,
        )
        reported = runner.run(proposals)
        return Replay(reported, runner.stats, source.entered, source.tiles)

    def _tile_use(self, tile_threshold: float) -> TileUse | None:
        if self.tiles is None:
            return None
        assert self.pooler is not None
        place = self.tiles.index(tile_threshold)
        opened = [tiles[place] for tiles in self.tiles.opened]
        return TileUse(opened, self.pooler, pools_whole_maps=self.pools_whole_maps)

    def select(self, reported: Sequence[ReportedRegions]) -> list[RecordedDetections]:
        """Detections of every image, in pixels of the resized images.

        Args:
            reported: by a replay, which reports no region twice.
        """
        exit_stages = torch.zeros_like(self.image_index)
        for regions in reported:
            exit_stages[regions.proposal_index] = regions.exit_stages
        by_row = [replace(r, exit_stages=r.proposal_index) for r in reported]
        found = select_detections(by_row, self.num_images, self.selection)
        return [
            RecordedDetections(
                d.boxes, d.scores, d.classes, exit_stages[d.exit_stages], rows=d.exit_stages
            )
            for d in found
        ]

    def _proposal_regions(self, tile_threshold: float) -> Regions:
        regions = Regions(
            self.proposals,
            self.image_index,
            self.objectness,
            torch.arange(len(self.proposals), device=self.proposals.device),
        )
        if self.tiles is None and tile_threshold <= 0:
            return regions
        return regions[self.rows(tile_threshold)]


class _RecordSource:
    """A record as a ``StageSource``, which counts the regions that enter each stage."""

    def __init__(self, record: CascadeRecord, tiles: TileUse | None) -> None:
        self.tiles = tiles
        self.num_images = record.num_images
        self.entered = record.image_index.new_zeros(record.num_stages, record.num_images)
        self._record = record

    def run_stage(self, regions: Regions, stage: int) -> StageResult:
        self.entered[stage] = torch.bincount(regions.image_index, minlength=self.num_images)
        if self.tiles is not None:
            self.tiles.read(regions.boxes, regions.image_index)
        decoded = self._record.stages[stage].decoded[regions.proposal_index]
        return StageResult(self._record.refine(regions, stage), decoded)

    def final_probs(self, result: StageResult, stage: int) -> Tensor:
        return self._record.final_probs(stage, result.regions.proposal_index)

    def crops(self, regions: Regions) -> Tensor:
        if self._record.crops is None:
            raise ValueError("the record has no crops: record with a policy that needs them")
        if self.tiles is not None:
            self.tiles.read(regions.boxes, regions.image_index)
        return self._record.crops[regions.proposal_index]


def join_records(records: Sequence[CascadeRecord]) -> CascadeRecord:
    """Concatenate records, in order; a field that one of them lacks is ``None``.

    Raises:
        ValueError: there are no records.
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
        selection=first.selection,
        pooler=first.pooler,
        pools_whole_maps=first.pools_whole_maps,
        tiles=join_tiles([record.tiles for record in records]),
        **_join([{name: getattr(record, name) for name in names} for record in records]),
    )


def _map_tensors(function: Callable[[Tensor], Tensor], part: object) -> dict[str, Any]:
    """The fields of a dataclass, with ``function`` applied to tensors."""
    return {n: function(x) if isinstance(x, Tensor) else x for n, x in vars(part).items()}


def _join(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        joined[name] = None if any(v is None for v in values) else torch.cat(values)
    return joined
