"""A detector as a function of one image, in operations that can be exported.

Every region runs through the same stages. Shapes: R regions, K foreground classes, D detections.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from cascade_det.core import Detections, MaskBranch
from cascade_det.core.regions import Regions
from cascade_det.core.roi_pooling import Pyramid
from cascade_det.core.structures.boxes import clip_boxes, decode_boxes, is_nonempty
from cascade_det.standalone.detector import Detector

# Pixels; wider than any image, and exact in float64.
_CLASS_OFFSET = 2.0**20
_LOWEST_SCORE = torch.finfo(torch.float32).min
_PADDING_SCORE = _LOWEST_SCORE / 2  # below every score, above the threshold of NMS
_ALL = 2**31 - 1


class FixedDepthDetector(nn.Module):
    """A detector that runs its first stages, without exits, as ``detect_stages`` does.

    Args:
        detector: in evaluation mode, not optimised; its parameters are shared.
        num_stages: stages that every region runs through, 1 or more.

    Raises:
        ValueError: the detector has fewer stages, or is optimised.
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
        if (suppression := detector.roi_heads.selection.suppression) != "nms":
            raise ValueError(f"an exported detector has NMS, not {suppression!r}")
        self.detector = detector
        self.num_stages = num_stages

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Detections of one image, best score first.

        Args:
            image: uint8 ``[3, H, W]``, already resized.

        Returns:
            Boxes float32 ``[D, 4]``, XYXY in pixels of this image; scores float32 ``[D]``; classes
            int64 ``[D]`` in ``[0, K)``; of a detector with masks also masks float32 ``[D, M, M]``,
            all 0 where the rules of the detector (``MaskRules``) leave one out.
        """
        detector = self.detector
        height, width = image.shape[-2:]
        step = detector.backbone.size_divisibility
        pixels = (image - detector.pixel_mean) / detector.pixel_std
        # Exporters handle floor division better than remainders.
        right, bottom = ((side + step - 1) // step * step - side for side in (width, height))
        maps = detector.backbone(F.pad(pixels, (0, right, 0, bottom))[None])
        sides = [torch.scalar_tensor(side, device=image.device) for side in (width, height)]
        image_bounds = torch.stack(sides * 2)[None]
        # One extra region, dropped in the end: some runtimes cannot reshape empty tensors.
        proposals = torch.cat([self._propose(maps, image_bounds), image_bounds])
        # Without a table, pooling uses torchvision's kernel, the one that can be exported.
        pyramid = Pyramid([maps[name] for name in detector.roi_in_features])
        found = self._select(*self._run_stages(pyramid, proposals, image_bounds))
        branch = detector.roi_heads.masks
        if branch is None:
            return found
        boxes, scores, classes = found
        detections = Detections(boxes, scores, classes, exit_stages=classes)
        return (*found, self._masks(branch, pyramid, image_bounds, detections))

    def _propose(self, maps: dict[str, Tensor], image_bounds: Tensor) -> Tensor:
        """``RPN.propose`` for one image: float32 ``[R, 4]``, best objectness first."""
        rpn = self.detector.proposal_generator
        most = rpn.pre_nms_topk[1]
        levels = [maps[name] for name in rpn.in_features]
        scores, boxes = [], []
        for level, (logits, deltas) in enumerate(zip(*rpn.rpn_head(levels), strict=True)):
            # Padded, so that top-k has the same size for images of all sizes.
            top, index = F.pad(logits[0], (0, most), value=-torch.inf).topk(most)
            index = index.clamp(max=logits.shape[1] - 1)
            anchors = rpn.anchor_generator.at(level, index, levels[level].shape[-1])
            boxes.append(decode_boxes(deltas[0][index], anchors, rpn.bbox_reg_weights))
            scores.append(top)
        all_boxes, all_scores = torch.cat(boxes), torch.cat(scores)
        level_index = torch.arange(len(levels), device=image_bounds.device).repeat_interleave(most)
        finite = torch.isfinite(all_boxes).all(dim=1) & torch.isfinite(all_scores)
        clipped = clip_boxes(all_boxes, image_bounds)
        valid = torch.nonzero(finite & is_nonempty(clipped, rpn.min_box_size)).squeeze(1)
        kept = best_of_classes(
            clipped[valid],
            all_scores[valid],
            level_index[valid],
            num_classes=len(levels),
            iou=rpn.nms_thresh,
            most=rpn.post_nms_topk[1],
        )
        return clipped[valid][kept]

    def _run_stages(
        self, pyramid: Pyramid, proposals: Tensor, image_bounds: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Boxes ``[R, 4]`` or ``[R, 4 K]`` and probabilities ``[R, K + 1]`` of the last stage."""
        heads = self.detector.roi_heads
        network = heads.network(pyramid, image_bounds)
        image_index = torch.zeros_like(proposals[:, 0], dtype=torch.int64)
        regions = Regions(proposals, image_index, proposals[:, 0], image_index)
        result = network.run_stage(regions, 0)
        for stage in range(1, self.num_stages):
            result = network.run_stage(result.regions, stage)
        probs = network.final_probs(result, self.num_stages - 1)
        if heads.exits is not None:
            probs = heads.exits.calibrated(probs, self.num_stages - 1)
        return result.decoded, probs

    def _select(self, boxes: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``select_detections`` for all regions but the last, without empty boxes."""
        heads = self.detector.roi_heads
        finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(probs).all(dim=1)
        chosen = (probs[:, :-1] > heads.selection.score_thresh) & finite[:, None]
        regions, classes = torch.nonzero(chosen[:-1], as_tuple=True)
        per_class = boxes.unflatten(1, (-1, 4))
        column = classes if per_class.shape[1] > 1 else torch.zeros_like(classes)
        candidates, scores = per_class[regions, column], probs[regions, classes]
        most = heads.selection.detections_per_image
        kept = best_of_classes(
            candidates,
            scores,
            classes,
            num_classes=heads.num_classes,
            iou=heads.selection.nms_thresh,
            most=most if most >= 0 else _ALL,
        )
        kept = kept[torch.nonzero(is_nonempty(candidates[kept])).squeeze(1)]
        return candidates[kept], scores[kept], classes[kept]

    def _masks(
        self,
        branch: MaskBranch,
        pyramid: Pyramid,
        image_bounds: Tensor,
        detections: Detections,
    ) -> Tensor:
        """``MaskBranch.add`` for one image: float32 ``[D, M, M]``."""
        rows = torch.nonzero(branch.rules.chosen(detections)).squeeze(1)
        # One extra region here too.
        boxes = torch.cat([detections.boxes[rows], image_bounds])
        classes = F.pad(detections.classes[rows], (0, 1))
        image_index = torch.zeros_like(classes)
        made = branch.probabilities(pyramid, boxes, image_index, classes, stages=self.num_stages)
        masks = made.new_zeros(detections.scores.shape[0], made.shape[1], made.shape[2])
        return masks.index_put((rows,), made[:-1])


def best_of_classes(
    boxes: Tensor, scores: Tensor, classes: Tensor, *, num_classes: int, iou: float, most: int
) -> Tensor:
    """NMS within each class: int64 indices of the best ``most`` boxes kept, best score first.

    Arguments as in ``class_nms``.
    """
    count = boxes.shape[0]
    # Two empty boxes that sort last and are not returned: torch.export assumes two rows or more.
    boxes = F.pad(boxes, (0, 0, 0, 2))
    scores = F.pad(scores, (0, 2), value=_PADDING_SCORE)
    classes = F.pad(classes, (0, 2))
    kept = class_nms(boxes, scores, classes, num_classes, iou)
    order = kept[scores[kept].argsort(descending=True)]
    # Not a slice: exporters would assume that it has ``most`` elements, even if there are fewer.
    rank = torch.arange(order.shape[0], device=order.device)
    return order[torch.nonzero((rank < most) & (order < count)).squeeze(1)]


def class_nms(
    boxes: Tensor, scores: Tensor, classes: Tensor, num_classes: int, iou: float
) -> Tensor:
    """NMS within each class: int64 indices of the boxes kept, in any order.

    Args:
        boxes: float32 ``[C, 4]``, inside an image.
        scores: float32 ``[C]``.
        classes: int64 ``[C]`` in ``[0, num_classes)``.
        num_classes: K.
        iou: threshold above which the lower-scored of two boxes of a class is suppressed.
    """
    if torch.jit.is_tracing():
        kept: Tensor = _ClassNMS.apply(boxes, scores, classes, num_classes, iou)
        return kept
    return _nms_with_offsets(boxes, scores, classes, iou)


def _nms_with_offsets(boxes: Tensor, scores: Tensor, classes: Tensor, iou: float) -> Tensor:
    # In float64, because the offsets would cost float32 boxes fractions of a pixel.
    kept: Tensor = nms(boxes.double() + classes[:, None] * _CLASS_OFFSET, scores.double(), iou)
    return kept


class _ClassNMS(torch.autograd.Function):
    """Exported as the NonMaxSuppression operator of ONNX, which separates classes itself."""

    @staticmethod
    def forward(
        ctx: Any, boxes: Tensor, scores: Tensor, classes: Tensor, num_classes: int, iou: float
    ) -> Tensor:
        return _nms_with_offsets(boxes, scores, classes, iou)

    @staticmethod
    def symbolic(
        graph: Any, boxes: Any, scores: Any, classes: Any, num_classes: int, iou: float
    ) -> Any:
        def constant(value: Any) -> Any:
            return graph.op("Constant", value_t=torch.tensor(value))

        axis = constant([0])
        class_index = graph.op("Constant", value_t=torch.arange(num_classes)[:, None])
        of_class = graph.op("Equal", class_index, graph.op("Unsqueeze", classes, axis))
        table = graph.op(
            "Where", of_class, graph.op("Unsqueeze", scores, axis), constant(-torch.inf)
        )
        selected = graph.op(
            "NonMaxSuppression",
            graph.op("Unsqueeze", boxes, axis),
            graph.op("Unsqueeze", table, axis),
            constant([_ALL]),
            constant([iou]),
            constant([_LOWEST_SCORE]),
        )
        # [M, 3]: image, class, box
        return graph.op("Gather", selected, constant(2), axis_i=1)
