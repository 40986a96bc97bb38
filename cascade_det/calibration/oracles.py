"""Exits for comparison: at random, and by oracles that know the full cascade's result.

Each policy is made for one record, of R regions in N images and S stages.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.ops import box_iou

from cascade_det.calibration.image_matching import IOUS
from cascade_det.core.exits import BEFORE_STAGES, ExitPolicy, RegionView
from cascade_det.core.postprocess import Frame, rescale_boxes
from cascade_det.core.record import CascadeRecord

Objects = tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]


class ExitAfter:
    """Makes every region exit after a given stage.

    Args:
        reason: "background" drops the region, "confident" reports it.
        stages: int64 ``[R]``, by the rows of a record; -1 is before stage 0, S - 1 or more never.
    """

    def __init__(self, reason: str, stages: Tensor) -> None:
        self.reason = reason
        self.stages = stages

    def is_active(self, stage: int) -> bool:
        """Whether any region exits after ``stage`` (-1: before the first)."""
        return bool((self.stages <= stage).any())

    def exit_mask(self, view: RegionView) -> Tensor:
        """Bool ``[R]``."""
        assert view.proposal_index is not None
        return self.stages[view.proposal_index] <= view.stage


def random_exits(record: CascadeRecord, shares: Sequence[float], *, accept: bool) -> ExitPolicy:
    """Random regions exit, as many at each gate as wanted; the same ones of the same record.

    Args:
        record: of some images.
        shares: S falling numbers in [0, 1]: the share of all proposals that enters each stage,
            exact to one region. Regions that do not enter stage 0 are lost.
        accept: whether regions that saw a stage are reported rather than dropped.
    """
    rows = record.rows()
    seed = zlib.crc32(record.proposals.numpy().tobytes())  # A different order in each record.
    ranks, count = torch.zeros(len(record.proposals)), len(rows)
    ranks[rows] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).float()
    entered = (ranks[:, None] + 0.5) / max(count, 1) < torch.tensor([*shares])  # [R, S]
    return _policy(
        record, ExitAfter("confident" if accept else "background", entered.sum(dim=1) - 1)
    )


def drop_oracle(record: CascadeRecord, *, before_stages: bool = False) -> ExitPolicy:
    """Drops every region that has no final detection of the full cascade: no detection changes.

    Args:
        record: of some images.
        before_stages: drop before stage 0 rather than after it.
    """
    return _policy(record, _dropping(record, _carried(record)[0], before_stages))


def outcome_oracle(
    record: CascadeRecord,
    objects: Sequence[Objects],
    frames: Sequence[Frame],
    *,
    before_stages: bool = False,
) -> ExitPolicy:
    """Drops the regions of ``drop_oracle``, and accepts the others once their outcome is settled.

    The outcome of a region is its most probable class and, for each of its final detections, how
    many of COCO's ten IoU thresholds the box passes with the best object of its class. It is
    settled after the first stage from which it stays the same. Scores may still change, and with
    them the AP slightly, in either direction.

    Args:
        record: of N images.
        objects: of each image, see ``ImageMatcher.objects_of``.
        frames: of each image, see ``Recording``.
        before_stages: see ``drop_oracle``.
    """
    rows, classes, images = _carried(record)
    top, boxes = _reported(record, rows, classes)
    passed = torch.zeros_like(top)
    for image, (own_objects, frame) in enumerate(zip(objects, frames, strict=True)):
        own = images == image
        found = rescale_boxes(boxes[:, own].flatten(0, 1), *frame)
        counts = _passed_thresholds(found, classes[own].repeat(len(boxes)), own_objects)
        passed[:, own] = counts.reshape(len(boxes), -1)
    same = (top == top[-1]) & (passed == passed[-1])
    since = len(same) - same.flip(0).cumprod(dim=0).sum(dim=0)  # [D], the first stage of them
    settled = torch.full((len(record.proposals),), -1).scatter_reduce(0, rows, since, "amax")
    settled[settled < 0] = record.num_stages
    drop = _dropping(record, rows, before_stages)
    return _policy(record, drop, ExitAfter("confident", settled))


def _policy(record: CascadeRecord, *rules: ExitAfter) -> ExitPolicy:
    policy = ExitPolicy(num_stages=record.num_stages)
    policy.rules = rules
    return policy


def _dropping(record: CascadeRecord, kept_rows: Tensor, before_stages: bool) -> ExitAfter:
    stages = torch.full((len(record.proposals),), BEFORE_STAGES if before_stages else 0)
    stages[kept_rows] = record.num_stages
    return ExitAfter("background", stages)


def _carried(record: CascadeRecord) -> tuple[Tensor, Tensor, Tensor]:
    """Row, class and image of all D final detections of the full cascade, ``[D]`` each."""
    found = record.select(record.replay(None).reported)
    rows = torch.cat([detections.rows for detections in found])
    classes = torch.cat([detections.classes for detections in found])
    return rows, classes, record.image_index[rows]


def _reported(record: CascadeRecord, rows: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The top class ``[S, D]`` and box ``[S, D, 4]`` of D detections after each stage."""
    top, boxes = [], []
    for stage in range(record.num_stages):
        top.append(record.final_probs(stage)[rows, :-1].argmax(dim=1))
        per_class = record.stages[stage].decoded.unflatten(1, (-1, 4))
        boxes.append(per_class[rows, classes if per_class.shape[1] > 1 else 0])
    return torch.stack(top), torch.stack(boxes)


def _passed_thresholds(boxes: Tensor, classes: Tensor, objects: Objects) -> Tensor:
    """Number of COCO's IoUs that each box passes with the best object of its class, ``[D]``."""
    gt_boxes, gt_classes = (torch.from_numpy(part) for part in objects)
    overlaps = box_iou(boxes.double(), gt_boxes) * (classes[:, None] == gt_classes)
    # The column of zeros is for images without objects.
    best = torch.nn.functional.pad(overlaps, (1, 0)).amax(dim=1)
    return (best[:, None] >= torch.from_numpy(IOUS)).sum(dim=1)
