"""From scored regions to detections: score threshold, per-class NMS, top-k."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from cascade_det.core.regions import ReportedRegions
from cascade_det.core.structures import Detections, StageOutput
from cascade_det.core.structures.boxes import is_nonempty


def select_detections(
    boxes: Tensor,
    probs: Tensor,
    image_index: Tensor,
    exit_stages: Tensor,
    *,
    num_images: int,
    score_thresh: float,
    nms_thresh: float,
    detections_per_image: int,
) -> list[Detections]:
    """Keep the best detections of each image, as Detectron2's Fast R-CNN inference does.

    Args:
        boxes: float32 ``[R, 4]`` or class-specific ``[R, 4 K]``, XYXY pixels inside the image.
        probs: float32 ``[R, K + 1]``; the last column is background.
        image_index: int64 ``[R]``.
        exit_stages: int64 ``[R]``.
        num_images: N.
        score_thresh: detections must score above it.
        nms_thresh: of two boxes of one class that overlap by more, the lower score goes.
        detections_per_image: at most this many for each image; negative keeps all.

    Returns:
        N ``Detections``, each by falling score. Rows with NaN or Inf are left out.
    """
    finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(probs).all(dim=1)
    rows, classes = torch.nonzero((probs[:, :-1] > score_thresh) & finite[:, None], as_tuple=True)
    per_class = boxes.unflatten(1, (-1, 4))
    candidates = Detections(
        per_class[rows, classes if per_class.shape[1] > 1 else 0],
        probs[rows, classes],
        classes,
        exit_stages[rows],
    )
    images = image_index[rows]
    # NMS of all images in one call would shift boxes by up to N * K image sizes, where float32
    # has lost the fraction of a pixel; image by image keeps Detectron2's decisions.
    detections = []
    for image in range(num_images):
        of_image = candidates[torch.nonzero(images == image).squeeze(1)]
        kept = batched_nms(of_image.boxes, of_image.scores, of_image.classes, nms_thresh)
        if detections_per_image >= 0:
            kept = kept[:detections_per_image]
        detections.append(of_image[kept])
    return detections


def select_reported(
    scored: Sequence[ReportedRegions],
    num_images: int,
    *,
    score_thresh: float,
    nms_thresh: float,
    detections_per_image: int,
) -> list[Detections]:
    """Detections of what regions are reported as; arguments as in ``select_detections``."""
    return select_detections(
        torch.cat([s.boxes for s in scored]),
        torch.cat([s.probs for s in scored]),
        torch.cat([s.image_index for s in scored]),
        torch.cat([s.exit_stages for s in scored]),
        num_images=num_images,
        score_thresh=score_thresh,
        nms_thresh=nms_thresh,
        detections_per_image=detections_per_image,
    )


def rescale_detections(
    detections: Detections, from_size: tuple[int, int], to_size: tuple[int, int]
) -> Detections:
    """Detections in pixels of another size of the same image; boxes that become empty are dropped.

    Args:
        detections: of one image.
        from_size: ``(height, width)`` that the boxes refer to.
        to_size: ``(height, width)`` wanted.
    """
    boxes = rescale_boxes(detections.boxes, from_size, to_size)
    rescaled = Detections(boxes, detections.scores, detections.classes, detections.exit_stages)
    return rescaled[is_nonempty(boxes)]


def rescale_boxes(boxes: Tensor, from_size: Sequence[int], to_size: Sequence[int]) -> Tensor:
    """``[R, 4]`` boxes in pixels of another size of the image, clipped to it; see above."""
    scale_y, scale_x = to_size[0] / from_size[0], to_size[1] / from_size[1]
    limits = boxes.new_tensor([to_size[1], to_size[0], to_size[1], to_size[0]])
    scaled = boxes * boxes.new_tensor([scale_x, scale_y, scale_x, scale_y])
    return torch.minimum(scaled.clamp(min=0), limits)


def rescale_stage(
    stage: StageOutput, frames: Sequence[tuple[tuple[int, int], tuple[int, int]]]
) -> StageOutput:
    """The output of a stage in pixels of other sizes of its images.

    Args:
        stage: for N images.
        frames: N pairs of ``from_size`` and ``to_size``, see ``rescale_detections``.
    """

    def boxes(per_image: list[Tensor]) -> list[Tensor]:
        return [rescale_boxes(b, *frame) for b, frame in zip(per_image, frames, strict=True)]

    detections = zip(stage.detections, frames, strict=True)
    return StageOutput(
        [rescale_detections(d, *frame) for d, frame in detections],
        boxes(stage.boxes_before),
        boxes(stage.boxes_after),
    )
