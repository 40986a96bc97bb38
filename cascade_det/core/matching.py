"""Labels and samples regions for training, as Detectron2 does; matches detections to objects.

K is the number of foreground classes; class K is background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torchvision.ops import box_iou

from cascade_det.core.structures.boxes import flatten_images
from cascade_det.core.structures.on_device import group_sizes


class TrueMasks(Protocol):
    """The masks of G objects of a batch, however they are stored."""

    @property
    def known(self) -> Tensor:
        """Bool ``[G]``: which objects have a mask."""

    def crop(self, objects: Tensor, boxes: Tensor, size: int) -> Tensor:
        """Targets of a mask head.

        Args:
            objects: int64 ``[F]`` in ``[0, G)``, with a known mask each.
            boxes: float32 ``[F, 4]``, XYXY in absolute pixels.
            size: M.

        Returns:
            Bool ``[F, M, M]`` on the device of the boxes: the part of each mask inside its box.
        """


@dataclass
class GroundTruth:
    """The objects of a batch, flat.

    Attributes:
        boxes: float32 ``[G, 4]``, XYXY in absolute pixels, none empty.
        classes: int64 ``[G]`` in ``[0, K)``.
        image_index: int64 ``[G]``.
        masks: of the G objects; ``None`` for a detector without masks.
    """

    boxes: Tensor
    classes: Tensor
    image_index: Tensor
    masks: TrueMasks | None = None

    @classmethod
    def from_images(
        cls,
        boxes: Sequence[Tensor],
        classes: Sequence[Tensor],
        masks: TrueMasks | None = None,
    ) -> GroundTruth:
        """From the boxes ``[G_i, 4]`` and classes ``[G_i]`` of each image, and all masks."""
        flat_boxes, image_index = flatten_images(boxes)
        return cls(flat_boxes, torch.cat(list(classes)), image_index, masks)

    def images_with_objects(self, num_images: int) -> Tensor:
        """Bool ``[N]``: which images have objects."""
        return group_sizes(self.image_index, num_images) > 0


@dataclass
class LabelledRegions:
    """Regions and the ground truth that they are trained towards.

    Attributes:
        boxes: float32 ``[R, 4]``, XYXY in absolute pixels.
        image_index: int64 ``[R]``.
        gt_classes: int64 ``[R]`` in ``[0, K]``, K for background.
        gt_boxes: float32 ``[R, 4]``; undefined for background.
        ious: float32 ``[R]``, largest IoU with an object of the image; 0 without objects.
        gt_index: int64 ``[R]``, that object in the ground truth; undefined for background.
    """

    boxes: Tensor
    image_index: Tensor
    gt_classes: Tensor
    gt_boxes: Tensor
    ious: Tensor
    gt_index: Tensor

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Tensor) -> LabelledRegions:
        return LabelledRegions(**{name: field[index] for name, field in vars(self).items()})


@torch.no_grad()
def label_regions(
    boxes: Tensor,
    image_index: Tensor,
    ground_truth: GroundTruth,
    *,
    iou_threshold: float,
    num_classes: int,
) -> LabelledRegions:
    """Give each region the class of the object that it overlaps best, or background.

    Cascade R-CNN, arXiv 1712.00726, equation (5): foreground is ``iou >= iou_threshold``.

    Args:
        boxes: float32 ``[R, 4]``, none empty.
        image_index: int64 ``[R]``.
        ground_truth: objects of the batch.
        iou_threshold: in (0, 1).
        num_classes: K.
    """
    if len(ground_truth.boxes) == 0 or len(boxes) == 0:
        return LabelledRegions(
            boxes,
            image_index,
            torch.full_like(image_index, num_classes),
            torch.zeros_like(boxes),
            boxes.new_zeros(len(boxes)),
            torch.zeros_like(image_index),
        )
    overlaps = box_iou(ground_truth.boxes, boxes)  # [G, R]
    overlaps = overlaps.where(ground_truth.image_index[:, None] == image_index, 0.0)
    ious, matched = overlaps.max(dim=0)  # [R]
    background = ious < iou_threshold
    gt_classes = ground_truth.classes[matched].masked_fill(background, num_classes)
    gt_boxes = ground_truth.boxes[matched]
    return LabelledRegions(boxes, image_index, gt_classes, gt_boxes, ious, matched)


@torch.no_grad()
def sample_labels(
    labels: Tensor, *, num_samples: int, positive_fraction: float, negative_label: int
) -> tuple[Tensor, Tensor]:
    """Sample a minibatch from the regions of one image (Fast R-CNN, arXiv 1504.08083, section 2.3).

    Draws from torch's global generator in the order of Detectron2: one seed gives the same sample
    in both.

    Args:
        labels: int ``[R]``; ``negative_label`` is negative, -1 is ignored, the rest is positive.
        num_samples: size of the minibatch.
        positive_fraction: the largest share of positives; negatives fill the rest.
        negative_label: the label of negatives.

    Returns:
        int64 indices of the sampled positives and of the sampled negatives.
    """
    positive = torch.nonzero((labels != -1) & (labels != negative_label)).squeeze(1)
    negative = torch.nonzero(labels == negative_label).squeeze(1)
    num_positive = min(len(positive), int(num_samples * positive_fraction))
    num_negative = min(len(negative), num_samples - num_positive)
    drawn_positive = torch.randperm(len(positive), device=labels.device)[:num_positive]
    drawn_negative = torch.randperm(len(negative), device=labels.device)[:num_negative]
    return positive[drawn_positive], negative[drawn_negative]


def match_greedily(
    ious: Tensor, thresholds: Sequence[float], *, preferred: Tensor | None = None
) -> Tensor:
    """Give each box, in order, the free candidate that overlaps it most.

    Args:
        ious: ``[N, M]`` on the CPU, above 0 for pairs that may match; best box first.
        thresholds: T IoUs above 0; each has a matching of its own, of pairs that reach it.
        preferred: bool ``[N, M]``, candidates that come first among equal IoUs. After that, the
            first column comes first.

    Returns:
        int64 ``[T, N]``, the column that each box takes; -1 for none.
    """
    rows, columns = torch.nonzero(ious >= min(thresholds), as_tuple=True)
    values = ious[rows, columns]
    order = torch.arange(len(rows))
    if preferred is not None:
        order = torch.argsort(~preferred[rows, columns], stable=True)
    order = order[torch.argsort(values[order], descending=True, stable=True)]
    order = order[torch.argsort(rows[order], stable=True)]
    ordered = (rows[order].tolist(), columns[order].tolist(), values[order].tolist())
    taken = torch.full((len(thresholds), len(ious)), -1)
    for level, threshold in enumerate(thresholds):
        matched: dict[int, int] = {}
        used: set[int] = set()
        for row, column, value in zip(*ordered, strict=True):
            if value >= threshold and row not in matched and column not in used:
                matched[row] = column
                used.add(column)
        taken[level, list(matched)] = torch.tensor(list(matched.values()), dtype=torch.int64)
    return taken
