"""How well the masks that regions can get overlap the objects of their image.

Recorded once with the full cascade, so that masks are evaluated for any exits without the network.
S stages, R regions, K classes, G objects and P pairs of one image; N images of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from cascade_det.core import Detections, MaskBranch, MaskRules
from cascade_det.core.postprocess import Frame, rescale_boxes
from cascade_det.core.record import CascadeRecord, RecordedDetections
from cascade_det.core.roi_pooling import Pyramid
from cascade_det.masks.rle import Rle, encode_pasted

# The lowest IoU that counts in an evaluation.
LEAST_IOU = 0.5
# Masks per call of the head: some hundred megabytes.
CHUNK = 128


class MaskedObjects(NamedTuple):
    """The objects of an image, see ``cascade_det.evaluation.ground_truth.load_mask_truth``.

    Attributes:
        masks: G, compressed RLE in the original image.
        classes: int64 ``[G]`` in ``[0, K)``.
        crowds: bool ``[G]``.
    """

    masks: list[Rle]
    classes: npt.NDArray[np.int64]
    crowds: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class MaskOverlaps:
    """IoU of masks of an image with objects of their class, from ``LEAST_IOU``.

    The mask is that of a region, at its box after a stage, for a class. With a crowd, the IoU is
    COCO's: the share of the mask inside the crowd.

    Attributes:
        masks: int64 ``[P]``, ascending: ``(stage * R + region) * K + class``.
        objects: int64 ``[P]`` in ``[0, G)``.
        ious: float64 ``[P]``.
        num_regions: R.
        num_classes: K.
    """

    masks: npt.NDArray[np.int64]
    objects: npt.NDArray[np.int64]
    ious: npt.NDArray[np.float64]
    num_regions: int
    num_classes: int

    def of(self, detections: RecordedDetections, num_objects: int) -> npt.NDArray[np.float64]:
        """IoU of the masks of detections with all objects, ``[D, G]``; 0 below ``LEAST_IOU``.

        Args:
            detections: ``rows`` are those of the image alone.
            num_objects: G.
        """
        regions = detections.exit_stages * self.num_regions + detections.rows
        masks = (regions * self.num_classes + detections.classes).numpy()
        first = np.searchsorted(self.masks, masks)
        counts = np.searchsorted(self.masks, masks, side="right") - first
        rows = np.arange(len(masks)).repeat(counts)
        pairs = np.arange(len(rows)) + (first - counts.cumsum() + counts).repeat(counts)
        found = np.zeros((len(masks), num_objects))
        found[rows, self.objects[pairs]] = self.ious[pairs]
        return found


@dataclass(frozen=True)
class RecordedMasks:
    """What masks of a recording cost, and what they are worth.

    Attributes:
        rules: which detections get a mask.
        flops: multiply-adds of one mask.
        overlaps: of each of the N images; ``None`` where no object has a mask to compare with.
    """

    rules: MaskRules
    flops: float
    overlaps: list[MaskOverlaps] | None


def record_overlaps(
    masks: MaskBranch,
    pyramid: Pyramid,
    record: CascadeRecord,
    frames: Sequence[Frame],
    objects: Sequence[MaskedObjects],
) -> list[MaskOverlaps]:
    """Make the masks that any exits could ask for and that could match an object.

    They are those of a region, stage and class with a score above the score threshold whose box
    covers half of an object of the class.

    Args:
        masks: of the cascade; its rules do not matter.
        pyramid: features of the recorded images.
        record: of N images, on the CPU.
        frames: of each image, see ``rescale_detections``.
        objects: of each image.

    Returns:
        The overlaps of each image.
    """
    candidates = _candidates(record, objects)
    num_classes = record.final_probs(0).shape[1] - 1
    rows_per_image = torch.bincount(record.image_index, minlength=record.num_images).tolist()
    found, first = [], 0
    for index, own in enumerate(objects):
        here = torch.nonzero(record.image_index[candidates.rows] == index).squeeze(1)
        boxes = rescale_boxes(candidates.boxes[here], *frames[index])
        reached = _reached(boxes.double().numpy(), candidates.classes[here].numpy(), own)
        kept = torch.from_numpy(np.flatnonzero(reached))
        here, boxes = here[kept], boxes[kept]
        image = candidates[here]
        made = _made(masks, pyramid, image, index)
        rles = encode_pasted(made.numpy(), boxes.numpy(), *frames[index][1])
        ious = _ious(rles, image.classes.numpy(), own)
        rows, matched = np.nonzero(ious >= LEAST_IOU)
        regions = image.exit_stages * rows_per_image[index] + image.rows - first
        found.append(
            MaskOverlaps(
                (regions * num_classes + image.classes).numpy()[rows],
                matched,
                ious[rows, matched],
                rows_per_image[index],
                num_classes,
            )
        )
        first += rows_per_image[index]
    return found


def _candidates(record: CascadeRecord, objects: Sequence[MaskedObjects]) -> RecordedDetections:
    """Regions of all images with a class that an object of their image has, after each stage.

    By stage, then by region, then by class.
    """
    probs = torch.stack([record.final_probs(stage) for stage in range(record.num_stages)])
    probs = probs[..., :-1]  # [S, R, K]
    present = torch.zeros(record.num_images, probs.shape[2], dtype=torch.bool)
    for image, own in zip(present, objects, strict=True):
        image[torch.from_numpy(own.classes)] = True
    chosen = (probs > record.selection.score_thresh) & present[record.image_index]
    stages, rows, classes = torch.nonzero(chosen, as_tuple=True)
    decoded = torch.stack([stage.decoded for stage in record.stages]).unflatten(2, (-1, 4))
    boxes = decoded[stages, rows, classes if decoded.shape[2] > 1 else 0]
    scores = probs[stages, rows, classes]
    return RecordedDetections(boxes, scores, classes, stages, rows=rows)


def _reached(
    boxes: npt.NDArray[np.float64], classes: npt.NDArray[np.int64], objects: MaskedObjects
) -> npt.NDArray[np.bool_]:
    """Whether masks inside boxes (XYXY) can overlap an object of their class at ``LEAST_IOU``."""
    if not objects.masks:
        return np.zeros(len(boxes), bool)
    around = coco_mask.toBbox(objects.masks)  # [G, 4], XYWH
    low = np.maximum(boxes[:, None, :2], around[:, :2])
    high = np.minimum(boxes[:, None, 2:], around[:, :2] + around[:, 2:])
    # An interval has at most one pixel more than its length.
    pixels = np.clip(high - low + 1, 0, None).prod(axis=2)  # [P, G]
    enough = np.where(objects.crowds, 1, np.maximum(LEAST_IOU * coco_mask.area(objects.masks), 1))
    return ((pixels >= enough) & (classes[:, None] == objects.classes)).any(axis=1)


def _made(masks: MaskBranch, pyramid: Pyramid, image: Detections, index: int) -> Tensor:
    """The masks ``[P, M, M]`` of regions of the image ``index``, on the CPU."""
    device, made = pyramid.features[0].device, []
    for rows in torch.arange(len(image)).split(CHUNK):
        some = image[rows].to(device)
        images = torch.full_like(some.classes, index)
        probs = masks.probabilities(pyramid, some.boxes, images, some.classes)
        made.append(probs.float().cpu())
    return torch.cat(made)


def _ious(
    rles: Sequence[Rle | None], classes: npt.NDArray[np.int64], objects: MaskedObjects
) -> npt.NDArray[np.float64]:
    """IoU ``[P, G]`` of masks with objects; 0 where classes differ, and for empty masks."""
    ious = np.zeros((len(rles), len(objects.masks)))
    for index in np.unique(classes).tolist():
        rows = [row for row in np.flatnonzero(classes == index).tolist() if rles[row] is not None]
        here = np.flatnonzero(objects.classes == index)
        if rows:
            ious[np.ix_(rows, here)] = coco_mask.iou(
                [rles[row] for row in rows],
                [objects.masks[g] for g in here.tolist()],
                objects.crowds[here].astype(np.uint8),
            )
    return ious
