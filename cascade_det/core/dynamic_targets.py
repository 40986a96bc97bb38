"""Dynamic R-CNN: IoU thresholds and smooth-L1 betas that follow the training.

Shapes: R regions of a batch, N images, S stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, distributed, nn

from cascade_det.core.cascade_targets import CascadeTargets
from cascade_det.core.matching import GroundTruth, LabelledRegions
from cascade_det.core.structures.boxes import Weights, encode_boxes
from cascade_det.core.structures.on_device import group_sizes
from cascade_det.core.training_stage import TrainingStage


class DynamicTargets(nn.Module):
    """IoU thresholds and smooth-L1 betas from statistics of the regions (arXiv 2004.06002).

    IoU threshold: the mean over ``period`` passes of the ``k_iou``-th largest IoU of the regions
    of an image with the ground truth. Stage 0 takes all proposals, before sampling; images
    without objects are left out. The paper has one head, whose threshold rises without a limit.
    In a cascade each stage has its own statistic, limited by its configured IoU: stage s uses
    ``min(ious[s], max(iou_floor, statistic))``, and at least the threshold of the stage before.
    All stages start at the same low threshold, with enough foreground each, and reach the
    configured ones once the regions are good enough.

    Beta: the upper median over ``period`` passes of the ``k_beta * N``-th smallest mean target
    offset (abs(dx) + abs(dy)) / 2 of foreground regions, at most ``beta_start``. Each stage
    measures its own targets, with its own multipliers. Unlike in the paper, regions with targets
    of 0, the ground truth itself, are left out: in images of more than ``k_beta`` objects they
    alone would set the beta.

    Statistics are averaged over the processes, so all have the same state and the checkpoint of
    one restores all. Each part of an accumulated batch is one pass. All state is in buffers, so
    a resumed training is bit-equal to an uninterrupted one.

    Args:
        num_stages: S.
        k_iou: regions per image; 0 keeps the configured thresholds.
        k_beta: regions per image; 0 keeps the configured beta.
        period: passes between two updates.
        iou_floor: initial and lowest threshold.
        beta_start: initial and largest beta.
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
        # 0 marks a pass without foreground: offsets that count are above 0.
        self.register_buffer("beta_history", torch.zeros(num_stages, period))
        self.register_buffer("passes", torch.tensor(0))
        self._sums: Tensor | None = None
        self._values: tuple[list[float], list[float], int] | None = None

    def ious(self, configured: tuple[float, ...]) -> tuple[float, ...]:
        """The current thresholds of the stages, never above the ``configured`` ones."""
        if not self.k_iou:
            return configured
        statistics, _, _ = self._current()
        raised = [max(statistic, self.iou_floor) for statistic in statistics]
        return tuple(accumulate(map(min, configured, raised), max))

    def beta(self, stage: int, configured: float) -> float:
        """The current smooth-L1 beta of a stage."""
        return self._current()[1][stage] if self.k_beta else configured

    @torch.no_grad()
    def observe_proposals(self, ious: Tensor, image_index: Tensor, has_objects: Tensor) -> None:
        """Add the proposals of a pass, before ``finish_pass``: all at once, or image by image.

        Args:
            ious: float32 ``[R]``, largest IoU of each proposal with an object.
            image_index: int64 ``[R]``.
            has_objects: bool ``[N]``, which images have ground truth.
        """
        if self.k_iou:
            self._add_ious(0, ious, image_index, has_objects)

    @torch.no_grad()
    def finish_pass(
        self,
        stages: Sequence[TrainingStage],
        targets: Sequence[CascadeTargets],
        ground_truth: GroundTruth,
        num_images: int,
    ) -> dict[str, Tensor]:
        """Add the stages of a pass; every ``period`` passes, update thresholds and betas.

        Args:
            stages: S stages.
            targets: S targets of this pass.
            ground_truth: objects of the batch.
            num_images: N.

        Returns:
            ``stage<s>/iou_threshold`` and ``stage<s>/smooth_l1_beta`` of this pass.
        """
        metrics: dict[str, Tensor] = {}
        has_objects = ground_truth.images_with_objects(num_images)
        for stage, (own, output) in enumerate(zip(targets, stages, strict=True)):
            regions = output.regions
            if stage > 0 and self.k_iou:
                self._add_ious(stage, regions.ious, regions.image_index, has_objects)
            if self.k_beta:
                foreground = regions[own.foreground(regions)]
                weights = own.bbox_reg_weights[stage]
                self._add_offsets(stage, foreground, weights, self.k_beta * num_images)
            metrics[f"stage{stage}/iou_threshold"] = self.betas.new_tensor(own.ious[stage])
            metrics[f"stage{stage}/smooth_l1_beta"] = self.betas.new_tensor(own.smooth_l1_beta)
        self._store_pass()
        return metrics

    def _add_ious(self, stage: int, ious: Tensor, image_index: Tensor, has_objects: Tensor) -> None:
        counts = group_sizes(image_index, len(has_objects))  # [N]
        # Regions image by image, largest IoU first.
        by_iou = torch.argsort(ious, descending=True, stable=True)
        order = by_iou[torch.argsort(image_index[by_iou], stable=True)]
        counted = torch.nonzero(has_objects & (counts > 0)).squeeze(1)
        first = torch.cumsum(counts, 0) - counts
        kth = first[counted] + counts[counted].clamp(max=self.k_iou) - 1
        self._add(0, stage, ious[order[kth]])  # one per image that counts

    def _add_offsets(
        self, stage: int, foreground: LabelledRegions, weights: Weights, k: int
    ) -> None:
        offsets = encode_boxes(foreground.boxes, foreground.gt_boxes, weights)[:, :2]  # [F, 2]
        means = offsets.abs().mean(dim=1)  # [F]
        means = means[means > 0]
        if len(means):
            self._add(2, stage, means.kthvalue(min(k, len(means))).values[None])

    def _store_pass(self) -> None:
        """Add the sums of this pass, over all processes, to the statistics of the period."""
        sums = self._pass_sums()
        self._sums = None
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
        iou_sums, num_ious, beta_sums, num_betas = sums  # each [S]
        self.iou_sums += iou_sums / num_ious.clamp(min=1)
        self.iou_counts += num_ious > 0
        statistics, betas, passes = self._current()
        self.beta_history[:, passes % self.period] = beta_sums / num_betas.clamp(min=1)
        self.passes += 1
        self._values = statistics, betas, passes + 1
        if (passes + 1) % self.period == 0:
            self._update()

    def _update(self) -> None:
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
        sums = self._pass_sums()
        sums[row, stage] += values.sum()
        sums[row + 1, stage] += len(values)
        self._sums = sums

    def _pass_sums(self) -> Tensor:
        """``[4, S]``: sum and count of the IoUs, sum and count of the offsets of this pass."""
        return self.betas.new_zeros(4, len(self.betas)) if self._sums is None else self._sums

    def _current(self) -> tuple[list[float], list[float], int]:
        """IoU statistics, betas and passes as numbers, read from the device after a change."""
        if self._values is None:
            numbers = torch.stack((self.iou_statistics, self.betas)).tolist()
            self._values = numbers[0], numbers[1], int(self.passes)
        return self._values

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._values = None
