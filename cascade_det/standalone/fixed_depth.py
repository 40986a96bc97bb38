"""A detector as one function of one image, in operations that can be exported.

Every region takes the same stages. Shapes: R regions, K foreground classes, D detections.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from cascade_det.core.regions import Regions
from cascade_det.core.roi_pooling import Pyramid
from cascade_det.core.structures.boxes import clip_boxes, decode_boxes, is_nonempty
from cascade_det.standalone.detector import Detector

# Pixels; farther than any image is wide, and no loss of precision in float64.
_FAR = 2.0**20
_LOWEST = torch.finfo(torch.float32).min
_LAST = _LOWEST / 2
_ALL = 2**31 - 1


class FixedDepthDetector(nn.Module):
    """The first stages of a detector, without exits: what ``detect_stages`` gives after the last.

    Args:
        detector: in evaluation mode, not optimised; its parameters are shared.
        num_stages: how many stages every region takes, 1 or more.

    Raises:
        ValueError: the detector does not have so many stages, or is optimised.
    """

    def __init__(self, detector: Detector, num_stages: int) -> None:
        super().__init__()
        if not 1 <= num_stages <= detector.roi_heads.num_stages:
            raise ValueError(
                f"{num_stages} stages of a cascade of {detector.roi_heads.num_stages}: give a "
                f"number from 1 to {detector.roi_heads.num_stages}"
            )
        if detector.optimizations:
            raise ValueError("an optimised detector cannot be exported: build it without optimize")
        self.detector = detector
        self.num_stages = num_stages

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detections of one image, best score first.

        Args:
            image: uint8 ``[3, H, W]``, already resized.

        Returns:
            boxes float32 ``[D, 4]``, XYXY in pixels of this image; scores float32 ``[D]``; classes
            int64 ``[D]`` in ``[0, K)``.
        """
        detector = self.detector
        height, width = image.shape[-2:]
        step = detector.backbone.size_divisibility
        pixels = (image - detector.pixel_mean) / detector.pixel_std
        # Exporters know floors of quotients better than remainders.
        right, bottom = ((side + step - 1) // step * step - side for side in (width, height))
        maps = detector.backbone(F.pad(pixels, (0, right, 0, bottom))[None])
        sides = (width, height, width, height)
        limits = torch.stack([torch.scalar_tensor(s, device=image.device) for s in sides])[None]
        # With one region more, which is dropped in the end, a stage never has none: some of what
        # runs a file cannot reshape nothing.
        proposals = torch.cat([self._propose(maps, limits), limits])
        boxes, probs = self._run_stages(maps, proposals, limits)
        return self._select(boxes, probs)

    def _propose(self, maps: dict[str, Tensor], limits: Tensor) -> Tensor:
        """What ``RPN.propose`` gives for one image: float32 ``[R, 4]``, by falling objectness."""
        rpn = self.detector.proposal_generator
        most = rpn.pre_nms_topk[1]
        levels = [maps[name] for name in rpn.in_features]
        scores, boxes = [], []
        for level, (logits, deltas) in enumerate(zip(*rpn.rpn_head(levels), strict=True)):
            # Filled up, so that one number of anchors holds for images of all sizes.
            top, places = F.pad(logits[0], (0, most), value=-torch.inf).topk(most)
            places = places.clamp(max=logits.shape[1] - 1)
            anchors = rpn.anchor_generator.at(level, places, levels[level].shape[-1])
            boxes.append(decode_boxes(deltas[0][places], anchors, rpn.bbox_reg_weights))
            scores.append(top)
        all_boxes, all_scores = torch.cat(boxes), torch.cat(scores)
        level_index = torch.arange(len(levels), device=limits.device).repeat_interleave(most)
        finite = torch.isfinite(all_boxes).all(dim=1) & torch.isfinite(all_scores)
        clipped = clip_boxes(all_boxes, limits)
        rows = torch.nonzero(finite & is_nonempty(clipped, rpn.min_box_size)).squeeze(1)
        kept = best_of_classes(
            clipped[rows],
            all_scores[rows],
            level_index[rows],
            num_classes=len(levels),
            iou=rpn.nms_thresh,
            most=rpn.post_nms_topk[1],
        )
        return clipped[rows][kept]

    def _run_stages(
        self, maps: dict[str, Tensor], proposals: Tensor, limits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Boxes ``[R, 4]`` or ``[R, 4 K]`` and probabilities ``[R, K + 1]`` of the last stage."""
        heads = self.detector.roi_heads
        # Without a table: torchvision's kernel is the one that can be exported.
        pyramid = Pyramid([maps[name] for name in self.detector.roi_in_features])
        network = heads.network(pyramid, 1)
        image_index = torch.zeros_like(proposals[:, 0], dtype=torch.int64)
        regions = Regions(
            proposals, image_index, limits.expand_as(proposals), proposals[:, 0], image_index
        )
        result = network.run_stage(regions, 0)
        for stage in range(1, self.num_stages):
            result = network.run_stage(result.regions, stage)
        probs = network.final_probs(result, self.num_stages - 1)
        if heads.exits is not None:
            probs = heads.exits.calibrated(probs, self.num_stages - 1)
        return result.decoded, probs

    def _select(self, boxes: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What ``select_detections`` gives for all rows but the last, less boxes that are empty."""
        heads = self.detector.roi_heads
        finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(probs).all(dim=1)
        chosen = (probs[:, :-1] > heads.score_thresh) & finite[:, None]
        rows, classes = torch.nonzero(chosen[:-1], as_tuple=True)
        per_class = boxes.unflatten(1, (-1, 4))
        column = classes if per_class.shape[1] > 1 else torch.zeros_like(classes)
        candidates, scores = per_class[rows, column], probs[rows, classes]
        most = heads.detections_per_image
        kept = best_of_classes(
            candidates,
            scores,
            classes,
            num_classes=heads.num_classes,
            iou=heads.nms_thresh,
            most=most if most >= 0 else _ALL,
        )
        kept = kept[torch.nonzero(is_nonempty(candidates[kept])).squeeze(1)]
        return candidates[kept], scores[kept], classes[kept]


def best_of_classes(
    boxes: Tensor, scores: Tensor, classes: Tensor, *, num_classes: int, iou: float, most: int
) -> Tensor:
    """What NMS within each class keeps: int64 indices, best score first, ``most`` at most.

    Arguments as of ``class_nms``.
    """
    count = boxes.shape[0]
    # Two empty boxes more, which come last and are not returned: torch.export records an operation
    # on many rows as one that needs two.
    boxes = F.pad(boxes, (0, 0, 0, 2))
    scores = F.pad(scores, (0, 2), value=_LAST)
    classes = F.pad(classes, (0, 2))
    kept = class_nms(boxes, scores, classes, num_classes, iou)
    order = kept[scores[kept].argsort(descending=True)]
    # A slice would do, but exporters take its length for ``most`` even where there are fewer.
    place = torch.arange(order.shape[0], device=order.device)
    return order[torch.nonzero((place < most) & (order < count)).squeeze(1)]


def class_nms(
    boxes: Tensor, scores: Tensor, classes: Tensor, num_classes: int, iou: float
) -> Tensor:
    """NMS within each class: int64 indices of what is kept, in any order.

    Args:
        boxes: float32 ``[C, 4]``, inside an image.
        scores: float32 ``[C]``.
        classes: int64 ``[C]`` in ``[0, num_classes)``.
        num_classes: K.
        iou: of two boxes of one class that overlap by more, the lower score goes.
    """
    if torch.jit.is_tracing():
        kept: Tensor = _ClassNMS.apply(boxes, scores, classes, num_classes, iou)
        return kept
    return _far_apart(boxes, scores, classes, iou)


def _far_apart(boxes: Tensor, scores: Tensor, classes: Tensor, iou: float) -> Tensor:
    # In float32 the shift would cost boxes a fraction of a pixel, and change decisions.
    kept: Tensor = nms(boxes.double() + classes[:, None] * _FAR, scores.double(), iou)
    return kept


class _ClassNMS(torch.autograd.Function):
    """For ONNX, whose own operator knows classes."""

    @staticmethod
    def forward(
        ctx: Any, boxes: Tensor, scores: Tensor, classes: Tensor, num_classes: int, iou: float
    ) -> Tensor:
        return _far_apart(boxes, scores, classes, iou)

    @staticmethod
    def symbolic(
        graph: Any, boxes: Any, scores: Any, classes: Any, num_classes: int, iou: float
    ) -> Any:
        def constant(value: Any) -> Any:
            return graph.op("Constant", value_t=torch.tensor(value))

        first = constant([0])
        number = graph.op("Constant", value_t=torch.arange(num_classes)[:, None])
        of_class = graph.op("Equal", number, graph.op("Unsqueeze", classes, first))
        table = graph.op(
            "Where", of_class, graph.op("Unsqueeze", scores, first), constant(-torch.inf)
        )
        selected = graph.op(
            "NonMaxSuppression",
            graph.op("Unsqueeze", boxes, first),
            graph.op("Unsqueeze", table, first),
            constant([_ALL]),
            constant([iou]),
            constant([_LOWEST]),
        )
        # Rows of (image, class, box).
        return graph.op("Gather", selected, constant(2), axis_i=1)
