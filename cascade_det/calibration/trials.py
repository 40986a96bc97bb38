"""Tries exits on a recording of the full cascade: their detections, losses and work.

N images, S stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch

from cascade_det.calibration.bootstrap import average_precision
from cascade_det.calibration.found_objects import found_objects, lost_shares
from cascade_det.calibration.image_matching import ImageMatcher, MatchedDetections, join_images
from cascade_det.core.exits import ExitPolicy
from cascade_det.core.postprocess import rescale_detections
from cascade_det.core.record import CascadeRecord
from cascade_det.core.structures import Detections

# ``(height, width)`` of a resized image and of the original one.
Frame = tuple[tuple[int, int], tuple[int, int]]
# For all records, or one for each; ``None`` is the full cascade.
Policies = ExitPolicy | Sequence[ExitPolicy | None] | None


@dataclass(frozen=True)
class Recording:
    """The full cascade on a set of images.

    Attributes:
        records: of the N images, some in each.
        image_ids: N ids of the json.
        frames: N pairs of ``(height, width)``: of the resized image and of the original one.
        stage_flops: of one region in each of the S stages (multiply-adds).
    """

    records: list[CascadeRecord]
    image_ids: list[int]
    frames: list[Frame]
    stage_flops: tuple[float, ...]

    @property
    def most_proposals(self) -> int:
        """The largest number of proposals in an image."""
        counts = (torch.bincount(r.image_index, minlength=r.num_images) for r in self.records)
        return max(int(images.max()) for images in counts)

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
        return Recording(
            records,
            [self.image_ids[index] for index in kept],
            [self.frames[index] for index in kept],
            self.stage_flops,
        )


@dataclass(frozen=True)
class TrialSummary:
    """Metrics, losses and work of exits, without their detections.

    Attributes:
        metrics: ``AP``, ``AP50``, ``AP75`` and ``AP90`` in percent.
        entered: int64 ``[S, N]``, regions that enter each stage.
        lost: float64 ``[N]``, share of the full cascade's true positives in each image that are
            not found, at IoU 0.5; see ``found_objects``.
        lost_well_placed: the same at IoU 0.75.
        work: share of the full cascade's FLOPs in box heads, 0 to 1.
    """

    metrics: dict[str, float]
    entered: npt.NDArray[np.int64]
    lost: npt.NDArray[np.float64]
    lost_well_placed: npt.NDArray[np.float64]
    work: float

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
    """

    matched: MatchedDetections

    def summary(self) -> TrialSummary:
        """The summary without the detections."""
        names = (field.name for field in fields(TrialSummary))
        return TrialSummary(**{name: getattr(self, name) for name in names})


class ExitTrials:
    """Tries exits on a recording.

    Args:
        recording: of the full cascade.
        matcher: of the ground truth of these images.
        score: lowest score of a detection that can be lost; COCO's AP counts lower ones too.

    Attributes:
        full: the trial without exits.
    """

    def __init__(self, recording: Recording, matcher: ImageMatcher, *, score: float) -> None:
        self.recording = recording
        self.matcher = matcher
        self.score = score
        self._objects = [matcher.objects_of(image_id) for image_id in recording.image_ids]
        self._found = self._find(self.detections(None))
        self.full = self.replay(None)

    def replay(self, policy: Policies) -> Trial:
        """Replay the recording with other exits.

        Args:
            policy: for all records, or one for each; ``None`` for the full cascade.
        """
        entered, detections = self._replay(policy)
        ids = self.recording.image_ids
        matches = [self.matcher.match(i, found) for i, found in zip(ids, detections, strict=True)]
        flops = np.asarray(self.recording.stage_flops)
        proposed = sum(len(record.proposals) for record in self.recording.records)
        matched = join_images(matches)
        lost = np.array(
            [
                lost_shares(full, early)
                for full, early in zip(self._found, self._find(detections), strict=True)
            ]
        )
        return Trial(
            metrics=average_precision(matched),
            matched=matched,
            entered=entered,
            lost=lost[:, 0],
            lost_well_placed=lost[:, 1],
            work=float(entered.sum(axis=1) @ flops / max(proposed * flops.sum(), 1)),
        )

    def detections(self, policy: Policies) -> list[Detections]:
        """The detections of each image, in pixels of the original images."""
        return self._replay(policy)[1]

    def _replay(self, policy: Policies) -> tuple[npt.NDArray[np.int64], list[Detections]]:
        records = self.recording.records
        if policy is None or isinstance(policy, ExitPolicy):
            policy = [policy] * len(records)
        entered, detections = [], []
        with torch.no_grad():
            for record, own in zip(records, policy, strict=True):
                replay = record.replay(own)
                entered.append(replay.entered.numpy())
                detections += record.select(replay.reported)
        frames = self.recording.frames
        rescaled = [rescale_detections(d, *f) for d, f in zip(detections, frames, strict=True)]
        return np.concatenate(entered, axis=1), rescaled

    def _find(self, detections: Sequence[Detections]) -> list[npt.NDArray[np.bool_]]:
        return [
            found_objects(found, *objects, score=self.score)
            for found, objects in zip(detections, self._objects, strict=True)
        ]
