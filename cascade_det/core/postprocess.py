"""Selects detections from scored regions: score threshold, NMS or another suppression, top-k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cascade_det.core.regions import ReportedRegions
from cascade_det.core.structures import Detections, Found, StageOutput
from cascade_det.core.structures.boxes import is_nonempty
from cascade_det.core.structures.nms import nms_by_image
from cascade_det.core.structures.on_device import indices_by_group
from cascade_det.core.suppression import SUPPRESSIONS, fuse, soften

Frame = tuple[tuple[int, int], tuple[int, int]]  # (height, width) of boxes, and wanted


@dataclass
class Selection:
    """Which detections are reported.

    Attributes:
        score_thresh: detections score above it.
        nms_thresh: NMS drops the lower score of two boxes of a class with a larger IoU.
        detections_per_image: limit per image; negative for none.
        suppression: one of ``cascade_det.core.suppression.SUPPRESSIONS``.
        sigma: of "soft_gaussian".
        sources: how many views of an image the regions come from, for "wbf".

    Raises:
        ValueError: the suppression is unknown.
    """

    score_thresh: float
    nms_thresh: float
    detections_per_image: int
    suppression: str = "nms"
    sigma: float = 0.5
    sources: int = 1

    def __post_init__(self) -> None:
        if self.suppression not in SUPPRESSIONS:
            known = ", ".join(SUPPRESSIONS)
            raise ValueError(f"unknown suppression {self.suppression!r}; known: {known}")


def select_detections(
    reported: Sequence[ReportedRegions], num_images: int, selection: Selection
) -> list[Detections]:
    """Select the best detections of each image, as Detectron2's Fast R-CNN inference does.

    Args:
        reported: at least one batch of regions; boxes lie inside their image.
        num_images: N.
        selection: thresholds and limit.

    Returns:
        N ``Detections``, best score first. Rows with NaN or Inf are left out.
    """
    boxes = torch.cat([r.boxes for r in reported])  # [R, 4] or [R, 4 K]
    probs = torch.cat([r.probs for r in reported])  # [R, K + 1]
    finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(probs).all(dim=1)
    # C candidates: pairs of a region and a class.
    chosen = (probs[:, :-1] > selection.score_thresh) & finite[:, None]  # [R, K]
    rows, classes = torch.nonzero(chosen, as_tuple=True)
    per_class = boxes.unflatten(1, (-1, 4))  # [R, 1 or K, 4]
    candidates = Detections(
        per_class[rows, classes if per_class.shape[1] > 1 else 0],  # [C, 4]
        probs[rows, classes],
        classes,
        torch.cat([r.exit_stages for r in reported])[rows],
    )
    images = torch.cat([r.image_index for r in reported])[rows]
    if selection.suppression != "nms":
        by_image = indices_by_group(images, num_images)
        return [_suppressed(candidates[own], selection) for own in by_image]
    best_rows = nms_by_image(
        candidates.boxes,
        candidates.scores,
        images,
        classes,
        num_images=num_images,
        num_classes=chosen.shape[1],
        iou=selection.nms_thresh,
    )
    most = selection.detections_per_image
    return [candidates[own if most < 0 else own[:most]] for own in best_rows]


def _suppressed(candidates: Detections, selection: Selection) -> Detections:
    most, iou = selection.detections_per_image, selection.nms_thresh
    threshold = selection.score_thresh
    if selection.suppression == "wbf":
        return fuse(
            candidates, score_thresh=threshold, iou=iou, sources=selection.sources, most=most
        )
    sigma = selection.sigma if selection.suppression == "soft_gaussian" else None
    return soften(candidates, score_thresh=threshold, iou=iou, sigma=sigma, most=most)


def rescale_detections(detections: Sequence[Found], frames: Sequence[Frame]) -> list[Found]:
    """Rescale detections to other sizes of their images; boxes that become empty are dropped.

    Args:
        detections: of N images.
        frames: N pairs of ``(height, width)``, of the boxes and of the result.
    """
    if not detections:
        return []
    rescaled = [
        replace(own, boxes=rescale_boxes(own.boxes, *frame))
        for own, frame in zip(detections, frames, strict=True)
    ]
    empty = [~is_nonempty(own.boxes) for own in rescaled]
    dropped = torch.stack([rows.sum() for rows in empty]).tolist()  # One wait for all images.
    return [
        own[torch.argsort(rows.byte(), stable=True)[: len(own) - count]] if count else own
        for own, rows, count in zip(rescaled, empty, dropped, strict=True)
    ]


def rescale_boxes(boxes: Tensor, from_size: Sequence[int], to_size: Sequence[int]) -> Tensor:
    """Rescale boxes ``[R, 4]`` to another size of the image and clip them to it."""
    scale_y, scale_x = to_size[0] / from_size[0], to_size[1] / from_size[1]
    # Numbers, not tensors: those would have to be sent to a GPU.
    x = (boxes[:, 0::2] * scale_x).clamp(0, to_size[1])  # [R, 2]
    y = (boxes[:, 1::2] * scale_y).clamp(0, to_size[0])
    return torch.stack((x, y), dim=2).flatten(1)


def rescale_stage(stage: StageOutput, frames: Sequence[Frame]) -> StageOutput:
    """Rescale the output of a stage to other sizes of its images.

    Args:
        stage: of N images.
        frames: see ``rescale_detections``.
    """

    def boxes(per_image: list[Tensor]) -> list[Tensor]:
        return [rescale_boxes(b, *frame) for b, frame in zip(per_image, frames, strict=True)]

    return StageOutput(
        rescale_detections(stage.detections, frames),
        boxes(stage.boxes_before),
        boxes(stage.boxes_after),
    )
