"""Tries exits on a recording of the full cascade: their detections, losses and work.

N images, S stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
import torch

from cascade_det.calibration.bootstrap import (
    BOOTSTRAP_ROUNDS,
    Difference,
    average_precision,
    paired_bootstrap,
)
from cascade_det.calibration.found_objects import found_masks, found_objects, lost_shares
from cascade_det.calibration.image_matching import (
    ImageMatcher,
    MatchedDetections,
    join_images,
    mix_images,
)
from cascade_det.calibration.mask_overlaps import RecordedMasks
from cascade_det.core import MaskRules
from cascade_det.core.exits import ExitPolicy
from cascade_det.core.postprocess import Frame, rescale_detections
from cascade_det.core.record import CascadeRecord, RecordedDetections

# In front of the names of metrics of masks.
SEGM = "segm/"
# For all records, or one for each; ``None`` is the full cascade.
Policies = ExitPolicy | Sequence[ExitPolicy | None] | None
_Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Recording:
    """The full cascade on a set of images.

    Attributes:
        records: of the N images, some in each.
        image_ids: N ids of the json.
        frames: N pairs of ``(height, width)``: of the resized image and of the original one.
        stage_flops: of one region in each of the S stages (multiply-adds).
        masks: ``None`` for a cascade without masks.
    """

    records: list[CascadeRecord]
    image_ids: list[int]
    frames: list[Frame]
    stage_flops: tuple[float, ...]
    masks: RecordedMasks | None = None

    @property
    def most_proposals(self) -> int:
        """The largest number of proposals in an image."""
        counts = (
            torch.bincount(r.image_index[r.rows()], minlength=r.num_images) for r in self.records
        )
        return max(int(images.max()) for images in counts)

    @property
    def tile_thresholds(self) -> tuple[float, ...]:
        """The recorded tile thresholds, of which the first is 0; empty without a tile gate."""
        return next((r.tiles.thresholds for r in self.records if r.tiles is not None), ())

    def of_images(self, images: Sequence[int]) -> Recording:
        """Some of the images, by index, in the order of this recording."""
        wanted, first = set(images), 0
        records, kept = [], []
        for record in self.records:
            here = [i for i in range(record.num_images) if first + i in wanted]
            if here:
                records.append(record.select_images(here))
            kept += [first + i for i in here]
            first += record.num_images
        masks = self.masks
        if masks is not None and masks.overlaps is not None:
            masks = replace(masks, overlaps=[masks.overlaps[index] for index in kept])
        return Recording(
            records,
            [self.image_ids[index] for index in kept],
            [self.frames[index] for index in kept],
            self.stage_flops,
            masks,
        )


@dataclass(frozen=True)
class TrialSummary:
    """Metrics, losses and work of exits, without their detections.

    Attributes:
        metrics: ``AP``, ``AP50``, ``AP75`` and ``AP90`` in percent; where masks can be compared
            with those of objects also ``segm/AP`` and so on.
        entered: int64 ``[S, N]``, regions that enter each stage.
        lost: float64 ``[N]``, share of the full cascade's true positives in each image that are
            not found, at IoU 0.5; see ``found_objects`` and ``found_masks``.
        lost_well_placed: the same at IoU 0.75.
        work: share of the full cascade's FLOPs in box and mask heads.
        masks: int64 ``[N]``, detections that get a mask; 0 for a cascade without masks.
        tiles: int64 ``[4, N]``, tiles of the finest map by how they are computed, see
            ``TILE_WORK``; 0 where no tile thresholds are recorded.
    """

    metrics: dict[str, float]
    entered: npt.NDArray[np.int64]
    lost: npt.NDArray[np.float64]
    lost_well_placed: npt.NDArray[np.float64]
    work: float
    masks: npt.NDArray[np.int64]
    tiles: npt.NDArray[np.int64]

    def regions_left(self, full: TrialSummary) -> float:
        """Share of the full cascade's region-stages that are computed, 0 to 1."""
        return int(self.entered.sum()) / max(int(full.entered.sum()), 1)

    def exit_rate(self, full: TrialSummary) -> float:
        """Share of the full cascade's regions in later stages that are not computed, 0 to 1."""
        return 1 - int(self.entered[1:].sum()) / max(int(full.entered[1:].sum()), 1)


@dataclass(frozen=True)
class Trial(TrialSummary):
    """A summary with the detections, which are large.

    Attributes:
        matched: detections of all images, matched to their objects.
        matched_masks: the same by their masks; ``None`` without ``segm/AP``.
    """

    matched: MatchedDetections
    matched_masks: MatchedDetections | None = None

    def summary(self) -> TrialSummary:
        """The summary without the detections."""
        names = (field.name for field in fields(TrialSummary))
        return TrialSummary(**{name: getattr(self, name) for name in names})

    def differences(self, full: Trial, *, rounds: int = BOOTSTRAP_ROUNDS) -> dict[str, Difference]:
        """The differences of all ``metrics`` from another trial of the same images."""
        changes = paired_bootstrap(full.matched, self.matched, rounds=rounds)
        if self.matched_masks is not None:
            of_masks = paired_bootstrap(full.matched_by(SEGM), self.matched_masks, rounds=rounds)
            changes |= {SEGM + name: change for name, change in of_masks.items()}
        return changes

    def difference(self, full: Trial, metric: str) -> Difference:
        """One of the ``differences``."""
        changes = paired_bootstrap(full.matched_by(metric), self.matched_by(metric))
        return changes[metric.removeprefix(SEGM)]

    def matched_by(self, metric: str) -> MatchedDetections:
        """The matches that a metric is of."""
        if not metric.startswith(SEGM):
            return self.matched
        assert self.matched_masks is not None
        return self.matched_masks


class ExitTrials:
    """Tries exits on a recording.

    Args:
        recording: of the full cascade.
        matcher: of the ground truth of these images.
        score: lowest score of a detection that can be lost; COCO's AP counts lower ones too.
        loss: what can be lost: ``boxes`` or ``masks``.

    Attributes:
        full: the trial without exits.
    """

    def __init__(
        self, recording: Recording, matcher: ImageMatcher, *, score: float, loss: str = "boxes"
    ) -> None:
        self.recording = recording
        self.matcher = matcher
        self.score = score
        self.loss = loss
        entered, detections, masks, _ = self._replay(None)
        self._found = self._find(detections)
        self._full_flops = self._flops(entered, masks)
        self.full = self.replay(None)

    def replay(self, policy: Policies, rules: MaskRules | None = None) -> Trial:
        """Replay the recording with other exits.

        Args:
            policy: for all records, or one for each; ``None`` for the full cascade.
            rules: which detections get a mask; ``None`` for the recorded rules.
        """
        entered, detections, masks, tiles = self._replay(policy, rules)
        ids, recorded = self.recording.image_ids, self.recording.masks
        matched = join_images(
            self.matcher.match(i, found) for i, found in zip(ids, detections, strict=True)
        )
        metrics, matched_masks = average_precision(matched), None
        if recorded is not None and recorded.overlaps is not None:
            of_images = zip(ids, detections, recorded.overlaps, strict=True)
            matched_masks = join_images(self.matcher.match_masks(*image) for image in of_images)
            of_masks = average_precision(matched_masks)
            metrics |= {SEGM + name: value for name, value in of_masks.items()}
        lost = np.array(
            [
                lost_shares(full, early)
                for full, early in zip(self._found, self._find(detections), strict=True)
            ]
        )
        return Trial(
            metrics=metrics,
            matched=matched,
            matched_masks=matched_masks,
            entered=entered,
            masks=masks,
            tiles=tiles,
            lost=lost[:, 0],
            lost_well_placed=lost[:, 1],
            work=self._flops(entered, masks) / max(self._full_flops, 1),
        )

    def detections(self, policy: Policies) -> list[RecordedDetections]:
        """The detections of each image, in pixels of the original images."""
        return self._replay(policy)[1]

    def gigaflops(self, trial: TrialSummary) -> float:
        """Multiply-adds of the heads per image, in 10^9."""
        return self._flops(trial.entered, trial.masks) / len(self.recording.image_ids) / 1e9

    def _replay(
        self, policy: Policies, rules: MaskRules | None = None
    ) -> tuple[_Counts, list[RecordedDetections], _Counts, _Counts]:
        """Regions ``[S, N]``, detections in the original images, masks ``[N]``, tiles ``[4, N]``.

        ``rows`` of the detections are those of their image, and -1 for one without a mask.
        """
        records, recorded = self.recording.records, self.recording.masks
        if policy is None or isinstance(policy, ExitPolicy):
            policy = [policy] * len(records)
        if recorded is not None and rules is None:
            rules = recorded.rules
        entered, detections, tiles = [], [], []
        with torch.no_grad():
            for record, own in zip(records, policy, strict=True):
                replay = record.replay(own)
                entered.append(replay.entered.numpy())
                found = record.select(replay.reported)
                chosen = [torch.ones(len(d), dtype=torch.bool) for d in found]
                if rules is not None:
                    chosen = [rules.chosen(image) for image in found]
                if recorded is not None:
                    replay.read_masked(found, chosen)
                tiles.append(replay.tiles.numpy())
                firsts = torch.searchsorted(record.image_index, torch.arange(record.num_images))
                for first, image, masked in zip(firsts, found, chosen, strict=True):
                    rows = (image.rows - first).where(masked, -1)
                    detections.append(replace(image, rows=rows))
        masks = [0 if recorded is None else int((d.rows >= 0).sum()) for d in detections]
        frames = self.recording.frames
        rescaled = rescale_detections(detections, frames)
        counts = np.concatenate(entered, axis=1), np.concatenate(tiles, axis=1)
        return counts[0], rescaled, np.array(masks, np.int64), counts[1]

    def _flops(self, entered: _Counts, masks: _Counts) -> float:
        of_stages = entered.sum(axis=1) @ np.asarray(self.recording.stage_flops)
        of_mask = 0.0 if self.recording.masks is None else self.recording.masks.flops
        return float(of_stages + masks.sum() * of_mask)

    def _find(self, detections: Sequence[RecordedDetections]) -> list[npt.NDArray[np.bool_]]:
        found = []
        for index, (image_id, own) in enumerate(
            zip(self.recording.image_ids, detections, strict=True)
        ):
            if self.loss == "masks":
                recorded = self.recording.masks
                assert recorded is not None
                assert recorded.overlaps is not None
                overlaps = recorded.overlaps[index]
                crowds = self.matcher.masks_of(image_id).crowds
                found.append(found_masks(own, overlaps, crowds, score=self.score))
            else:
                objects = self.matcher.objects_of(image_id)
                found.append(found_objects(own, *objects, score=self.score))
        return found


def mixed_metrics(trials: Sequence[Trial], which: npt.NDArray[np.int64]) -> dict[str, float]:
    """Metrics where each image has the detections of one of the trials.

    Args:
        trials: of the same images.
        which: ``[N]``, the index of the trial for each image, by ascending id.
    """
    metrics = average_precision(mix_images([trial.matched for trial in trials], which))
    masks = [trial.matched_masks for trial in trials if trial.matched_masks is not None]
    if masks:
        of_masks = average_precision(mix_images(masks, which))
        metrics |= {SEGM + name: value for name, value in of_masks.items()}
    return metrics
