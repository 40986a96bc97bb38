"""Exits to compare others with: at random, and as an oracle that knows how everything ends.

They are made for one record, R regions of N images and S stages, and say nothing about others.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.ops import box_iou

from cascade_det.calibration.image_matching import IOUS
from cascade_det.core.exits import BEFORE_STAGES, ExitPolicy, RegionView
from cascade_det.core.postprocess import rescale_boxes
from cascade_det.core.record import CascadeRecord

Frame = tuple[tuple[int, int], tuple[int, int]]
Objects = tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]


class LeaveAfter:
    """Lets every region leave after a stage of its own.

    Args:
        reason: "background" drops the region, "confident" reports it as it is.
        stages: int64 ``[R]``, by the rows of a record; -1 is before stage 0, and S - 1 or more
            is never.
    """

    def __init__(self, reason: str, stages: Tensor) -> None:
        self.reason = reason
        self.stages = stages

    def is_active(self, stage: int) -> bool:
        """Whether anything may leave after ``stage`` (-1: before the first)."""
        return bool((self.stages <= stage).any())

    def leaves(self, view: RegionView) -> Tensor:
        """Bool ``[R]``."""
        assert view.rows is not None
        return self.stages[view.rows] <= view.stage


def random_exits(
    record: CascadeRecord, shares: Sequence[float], *, accept: bool, seed: int = 0
) -> ExitPolicy:
    """Regions leave by lot, as many at each gate as wanted.

    Args:
        record: of some images.
        shares: S falling numbers in [0, 1]: how much of all proposals enters each stage, up to
            one region. What does not enter stage 0 is lost.
        accept: whether regions that saw a stage are reported as they are, rather than dropped.
        seed: of the lots, which are the same for the same record.
    """
    count = len(record.proposals)
    own = zlib.crc32(record.proposals.numpy().tobytes())  # Else, alike places have alike luck.
    lots = torch.randperm(count, generator=torch.Generator().manual_seed(seed + own))
    entered = (lots[:, None] + 0.5) / max(count, 1) < torch.tensor([*shares])
    return _policy(
        record, LeaveAfter("confident" if accept else "background", entered.sum(dim=1) - 1)
    )


def drop_oracle(record: CascadeRecord, *, before_stages: bool = False) -> ExitPolicy:
    """Drops all that no final detection of the full cascade comes from: it changes nothing.

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
    """Drops what ``drop_oracle`` drops, and accepts the rest where its outcome is settled.

    The outcome of a region is its most probable class and, for each of its final detections, how
    many of COCO's ten IoU thresholds the box passes with the best object of its class. It is
    settled after the first stage from which on it stays the same. Scores may still change, and
    with them the AP: a little, in either direction.

    Args:
        record: of N images.
        objects: for each of them, as ``ImageMatcher.objects_of`` gives them.
        frames: for each of them, as in ``Recording``.
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
    return _policy(record, drop, LeaveAfter("confident", settled))


def _policy(record: CascadeRecord, *rules: LeaveAfter) -> ExitPolicy:
    policy = ExitPolicy(num_stages=record.num_stages)
    policy.rules = rules
    return policy


def _dropping(record: CascadeRecord, kept_rows: Tensor, before_stages: bool) -> LeaveAfter:
    stages = torch.full((len(record.proposals),), BEFORE_STAGES if before_stages else 0)
    stages[kept_rows] = record.num_stages
    return LeaveAfter("background", stages)


def _carried(record: CascadeRecord) -> tuple[Tensor, Tensor, Tensor]:
    """Row, class and image of all D final detections of the full cascade, ``[D]`` each."""
    scored = record.replay(None).scored
    by_row = [dataclasses.replace(s, exit_stages=s.rows) for s in scored]
    found = record.select(by_row)
    rows = torch.cat([detections.exit_stages for detections in found])
    classes = torch.cat([detections.classes for detections in found])
    return rows, classes, record.image_index[rows]


def _reported(record: CascadeRecord, rows: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """What each stage says of D detections: the top class ``[S, D]``, the box ``[S, D, 4]``."""
    top, boxes = [], []
    for stage in range(record.num_stages):
        run = record.run_stage(record.start(), stage)
        top.append(record.reported(run, stage)[rows, :-1].argmax(dim=1))
        per_class = run.decoded.unflatten(1, (-1, 4))
        boxes.append(per_class[rows, classes if per_class.shape[1] > 1 else 0])
    return torch.stack(top), torch.stack(boxes)


def _passed_thresholds(boxes: Tensor, classes: Tensor, objects: Objects) -> Tensor:
    """How many of COCO's IoUs each box passes with the best object of its class, int64 ``[D]``."""
    gt_boxes, gt_classes = (torch.from_numpy(part) for part in objects)
    overlaps = box_iou(boxes.double(), gt_boxes) * (classes[:, None] == gt_classes)
    # A column of zeros for images without objects.
    best = torch.nn.functional.pad(overlaps, (1, 0)).amax(dim=1)
    return (best[:, None] >= torch.from_numpy(IOUS)).sum(dim=1)
