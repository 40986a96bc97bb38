"""Dynamic R-CNN: what counts as foreground, and where smooth L1 bends, follow the training.

Shapes: R regions of a batch, N images, S stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, distributed, nn

from cascade_det.core.cascade_targets import CascadeTargets
from cascade_det.core.matching import LabelledRegions, Targets
from cascade_det.core.structures.boxes import Weights, encode_boxes
from cascade_det.core.training_stage import TrainingStage


class DynamicTargets(nn.Module):
    """IoU thresholds and smooth-L1 betas from statistics of the regions (arXiv 2004.06002).

    Label assignment: the threshold is the mean over ``period`` passes of the ``k_iou``-th largest
    IoU of an image's regions with the ground truth; for stage 0 of all proposals, before sampling.
    Images without objects do not count. The paper has one head, and a threshold that rises as far
    as the regions allow. In a cascade each stage has its own statistic, and its configured IoU is
    the upper end: stage s uses ``min(ious[s], max(iou_floor, statistic))``, and at least what the
    stage before uses. So the stages begin alike, with enough foreground each, and end as the
    cascade that was configured where regions are good enough for it.

    Smooth L1: beta is the upper median over ``period`` passes of the ``k_beta * N``-th smallest
    mean of the target offsets (abs(dx), abs(dy)) of foreground regions, and at most
    ``beta_start``. Each stage measures its own targets, with its own multipliers. Regions that
    are the ground truth itself have targets of 0 and do not count, as they do in the paper: in
    images of more than ``k_beta`` objects nothing else would.

    Statistics are means over the processes, so that all have the same state, and one process'
    checkpoint is everyone's. A part of an accumulated batch is a pass of its own. All state is in
    buffers: a training that is resumed goes on to the bit.

    Args:
        num_stages: S.
        k_iou: of each image; 0 keeps the configured thresholds.
        k_beta: of each image; 0 keeps the configured beta.
        period: passes between two changes.
        iou_floor: the first threshold, and the lowest.
        beta_start: the first beta, and the largest.
    """

    def __init__(
        self,
        *,
        num_stages: int,
        k_iou: int = 75,
        k_beta: int = 10,
        period: int = 100,
        iou_floor: float = 0.4,
        beta_start: float = 1.0,
    ) -> None:
        super().__init__()
        self.k_iou = k_iou
        self.k_beta = k_beta
        self.period = period
        self.iou_floor = iou_floor
        self.beta_start = beta_start
        self.iou_statistics: Tensor
        self.betas: Tensor
        self.iou_sums: Tensor
        self.iou_counts: Tensor
        self.beta_history: Tensor
        self.passes: Tensor
        self.register_buffer("iou_statistics", torch.full((num_stages,), iou_floor))
        self.register_buffer("betas", torch.full((num_stages,), beta_start))
        self.register_buffer("iou_sums", torch.zeros(num_stages))
        self.register_buffer("iou_counts", torch.zeros(num_stages))
        # 0 stands for a pass without foreground: no offset that counts is 0.
        self.register_buffer("beta_history", torch.zeros(num_stages, period))
        self.register_buffer("passes", torch.tensor(0))
        self._seen: Tensor | None = None
        self._values: tuple[list[float], list[float], int] | None = None

    def ious(self, configured: tuple[float, ...]) -> tuple[float, ...]:
        """The thresholds of the stages now, never above the ``configured`` ones."""
        if not self.k_iou:
            return configured
        statistics, _, _ = self._current()
        raised = [max(statistic, self.iou_floor) for statistic in statistics]
        return tuple(accumulate(map(min, configured, raised), max))

    def beta(self, stage: int, configured: float) -> float:
        """The beta of smooth L1 of a stage now."""
        return self._current()[1][stage] if self.k_beta else configured

    @torch.no_grad()
    def observe_proposals(self, ious: Tensor, image_index: Tensor, has_objects: Tensor) -> None:
        """Take in what stage 0 samples from, before ``finish_pass``; once, or image by image.

        Args:
            ious: float32 ``[R]``, of the proposals with their best ground truth.
            image_index: int64 ``[R]``.
            has_objects: bool ``[N]``, which images have ground truth.
        """
        if self.k_iou:
            self._add_ious(0, ious, image_index, has_objects)

    @torch.no_grad()
    def finish_pass(
        self,
        passes: Sequence[TrainingStage],
        rules: Sequence[CascadeTargets],
        targets: Targets,
        num_images: int,
    ) -> dict[str, Tensor]:
        """Take in the stages of a pass; after each ``period`` passes, act upon what was seen.

        Args:
            passes: of S stages.
            rules: of S stages, as they held in this pass.
            targets: ground truth of the batch.
            num_images: N.

        Returns:
            ``stage<s>/iou_threshold`` and ``stage<s>/smooth_l1_beta`` of this pass.
        """
        metrics: dict[str, Tensor] = {}
        has_objects = targets.are_in(num_images)
        for stage, (now, run) in enumerate(zip(rules, passes, strict=True)):
            if stage > 0 and self.k_iou:
                self._add_ious(stage, run.regions.ious, run.regions.image_index, has_objects)
            if self.k_beta:
                foreground = run.regions[now.foreground(run.regions)]
                weights = now.bbox_reg_weights[stage]
                self._add_offsets(stage, foreground, weights, self.k_beta * num_images)
            metrics[f"stage{stage}/iou_threshold"] = self.betas.new_tensor(now.ious[stage])
            metrics[f"stage{stage}/smooth_l1_beta"] = self.betas.new_tensor(now.smooth_l1_beta)
        self._take_down()
        return metrics

    def _add_ious(self, stage: int, ious: Tensor, image_index: Tensor, has_objects: Tensor) -> None:
        counts = torch.bincount(image_index, minlength=len(has_objects))
        by_iou = torch.argsort(ious, descending=True, stable=True)
        order = by_iou[torch.argsort(image_index[by_iou], stable=True)]
        counted = torch.nonzero(has_objects & (counts > 0)).squeeze(1)
        first = torch.cumsum(counts, 0) - counts
        places = first[counted] + counts[counted].clamp(max=self.k_iou) - 1
        self._add(0, stage, ious[order[places]])

    def _add_offsets(
        self, stage: int, foreground: LabelledRegions, weights: Weights, k: int
    ) -> None:
        offsets = encode_boxes(foreground.boxes, foreground.gt_boxes, weights)[:, :2]
        means = offsets.abs().mean(dim=1)
        means = means[means > 0]
        if len(means):
            self._add(2, stage, means.kthvalue(min(k, len(means))).values[None])

    def _take_down(self) -> None:
        """What this pass saw, on all processes, becomes history."""
        seen = self._seen_so_far()
        self._seen = None
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(seen)
        iou_sums, num_ious, beta_sums, num_betas = seen
        self.iou_sums += iou_sums / num_ious.clamp(min=1)
        self.iou_counts += num_ious > 0
        statistics, betas, passes = self._current()
        self.beta_history[:, passes % self.period] = beta_sums / num_betas.clamp(min=1)
        self.passes += 1
        self._values = statistics, betas, passes + 1
        if (passes + 1) % self.period == 0:
            self._renew()

    def _renew(self) -> None:
        means = self.iou_sums / self.iou_counts.clamp(min=1)
        self.iou_statistics.copy_(torch.where(self.iou_counts > 0, means, self.iou_statistics))
        for stage, history in enumerate(self.beta_history):
            known = history[history > 0].sort().values
            if len(known):
                self.betas[stage] = known[len(known) // 2].clamp(max=self.beta_start)
        for buffer in (self.iou_sums, self.iou_counts, self.beta_history):
            buffer.zero_()
        self._values = None

    def _add(self, row: int, stage: int, values: Tensor) -> None:
        seen = self._seen_so_far()
        seen[row, stage] += values.sum()
        seen[row + 1, stage] += len(values)
        self._seen = seen

    def _seen_so_far(self) -> Tensor:
        """``[4, S]``: sum and number of the IoUs, sum and number of the offsets, of this pass."""
        return self.betas.new_zeros(4, len(self.betas)) if self._seen is None else self._seen

    def _current(self) -> tuple[list[float], list[float], int]:
        """IoU statistics, betas and passes as numbers; the device is asked when they changed."""
        if self._values is None:
            numbers = torch.stack((self.iou_statistics, self.betas)).tolist()
            self._values = numbers[0], numbers[1], int(self.passes)
        return self._values

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._values = None
