"""Labelling and sampling of regions for training, as Detectron2 does it.

K is the number of foreground classes; class K is background.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou


@dataclass
class Targets:
    """Ground truth of a batch, flat.

    Attributes:
        boxes: float32 ``[G, 4]``, XYXY in absolute pixels, none empty.
        classes: int64 ``[G]`` in ``[0, K)``.
        image_index: int64 ``[G]``.
    """

    boxes: Tensor
    classes: Tensor
    image_index: Tensor

    def are_in(self, num_images: int) -> Tensor:
        """Which images have any: bool ``[N]``."""
        return torch.bincount(self.image_index, minlength=num_images) > 0


@dataclass
class LabelledRegions:
    """Regions with the ground truth that they are trained towards.

    Attributes:
        boxes: float32 ``[R, 4]``, XYXY in absolute pixels.
        image_index: int64 ``[R]``.
        gt_classes: int64 ``[R]`` in ``[0, K]``, K for background.
        gt_boxes: float32 ``[R, 4]``; of no meaning for background.
        ious: float32 ``[R]``, IoU with the best ground truth, 0 where an image has none.
    """

    boxes: Tensor
    image_index: Tensor
    gt_classes: Tensor
    gt_boxes: Tensor
    ious: Tensor

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Tensor) -> LabelledRegions:
        return LabelledRegions(
            self.boxes[index],
            self.image_index[index],
            self.gt_classes[index],
            self.gt_boxes[index],
            self.ious[index],
        )


@torch.no_grad()
def label_regions(
    boxes: Tensor, image_index: Tensor, targets: Targets, *, iou_threshold: float, num_classes: int
) -> LabelledRegions:
    """Give each region the class of the ground truth that it overlaps best, or background.

    Cascade R-CNN, arXiv 1712.00726, equation (5): foreground from ``iou_threshold`` upwards.

    Args:
        boxes: float32 ``[R, 4]``, none empty.
        image_index: int64 ``[R]``.
        targets: ground truth of the batch.
        iou_threshold: in (0, 1).
        num_classes: K.
    """
    if len(targets.boxes) == 0 or len(boxes) == 0:
        return LabelledRegions(
            boxes,
            image_index,
            torch.full_like(image_index, num_classes),
            torch.zeros_like(boxes),
            boxes.new_zeros(len(boxes)),
        )
    overlaps = box_iou(targets.boxes, boxes)
    overlaps = overlaps.where(targets.image_index[:, None] == image_index, 0.0)
    ious, matched = overlaps.max(dim=0)
    background = ious < iou_threshold
    gt_classes = targets.classes[matched].masked_fill(background, num_classes)
    return LabelledRegions(boxes, image_index, gt_classes, targets.boxes[matched], ious)


@torch.no_grad()
def sample_labels(
    labels: Tensor, *, num_samples: int, positive_fraction: float, negative_label: int
) -> tuple[Tensor, Tensor]:
    """Draw a random minibatch of one image's rows (Fast R-CNN, arXiv 1504.08083, section 2.3).

    Draws from torch's global generator in the same order as Detectron2, so that one seed gives
    the same sample in both.

    Args:
        labels: int ``[R]``; -1 is never drawn, every other label but ``negative_label`` is
            positive.
        num_samples: rows wanted in all.
        positive_fraction: the largest share of positives; negatives fill the rest.
        negative_label: the label of negatives.

    Returns:
        int64 rows of the drawn positives and of the drawn negatives.
    """
    positive = torch.nonzero((labels != -1) & (labels != negative_label)).squeeze(1)
    negative = torch.nonzero(labels == negative_label).squeeze(1)
    num_positive = min(len(positive), int(num_samples * positive_fraction))
    num_negative = min(len(negative), num_samples - num_positive)
    drawn_positive = torch.randperm(len(positive), device=labels.device)[:num_positive]
    drawn_negative = torch.randperm(len(negative), device=labels.device)[:num_negative]
    return positive[drawn_positive], negative[drawn_negative]


@torch.no_grad()
def sample_regions(
    regions: LabelledRegions,
    *,
    num_images: int,
    batch_size_per_image: int,
    positive_fraction: float,
    num_classes: int,
) -> LabelledRegions:
    """The regions of every image that its minibatch keeps, image by image, positives first."""
    kept = []
    for image in range(num_images):
        rows = torch.nonzero(regions.image_index == image).squeeze(1)
        positive, negative = sample_labels(
            regions.gt_classes[rows],
            num_samples=batch_size_per_image,
            positive_fraction=positive_fraction,
            negative_label=num_classes,
        )
        kept += [rows[positive], rows[negative]]
    return regions[torch.cat(kept)]
