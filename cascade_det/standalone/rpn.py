"""Region proposal network (Faster R-CNN, arXiv 1506.01497, section 3) with Detectron2's numbers.

Shapes: N images, L levels, A anchors at each position, G ground-truth boxes of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, box_iou

from cascade_det.core.boxes import Weights, clip_boxes, decode_boxes, image_limits, is_nonempty
from cascade_det.core.losses import box_loss
from cascade_det.core.matching import sample_labels
from cascade_det.standalone.anchors import AnchorGenerator

ImageSizes = Sequence[tuple[int, int]]


class RPNHead(nn.Module):
    """3x3 convolution(s) shared by the levels, then objectness and deltas of each anchor.

    Args:
        in_channels: C of the levels.
        num_anchors: A.
        conv_dims: output channels of the convolutions; -1 keeps the number.
    """

    def __init__(
        self, *, in_channels: int, num_anchors: int, conv_dims: Sequence[int] = (-1,)
    ) -> None:
        super().__init__()
        convs: list[nn.Conv2d] = []
        channels = in_channels
        for width in conv_dims:
            out_channels = channels if width == -1 else width
            convs.append(nn.Conv2d(channels, out_channels, 3, padding=1))
            channels = out_channels
        if len(convs) == 1:
            self.conv: nn.Module = convs[0]
        else:
            self.conv = nn.Sequential()
            for i, conv in enumerate(convs):
                self.conv.add_module(f"conv{i}", conv)
        self._convs = convs
        self.objectness_logits = nn.Conv2d(channels, num_anchors, 1)
        self.anchor_deltas = nn.Conv2d(channels, num_anchors * 4, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """L maps ``[N, C, H_l, W_l]`` to logits ``[N, M_l]``, deltas ``[N, M_l, 4]``; M = H W A."""
        logits, deltas = [], []
        for x in features:
            for conv in self._convs:
                x = F.relu(conv(x))
            logits.append(self.objectness_logits(x).permute(0, 2, 3, 1).flatten(1))
            level_deltas = self.anchor_deltas(x).unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2)
            deltas.append(level_deltas.flatten(1, 3))
        return logits, deltas


class RPN(nn.Module):
    """Scores anchors and turns the best into proposals.

    Args:
        in_features: names of the pyramid levels, finest first.
        in_channels: C of the levels.
        strides: of those levels.
        anchor_sizes: see ``AnchorGenerator``.
        aspect_ratios: likewise.
        anchor_offset: likewise.
        conv_dims: see ``RPNHead``.
        iou_thresholds: below the first an anchor is background, from the second on an object.
        batch_size_per_image: anchors sampled for the loss from each image.
        positive_fraction: the largest share of objects among them.
        pre_nms_topk: (training, inference) proposals kept of each level before NMS.
        post_nms_topk: (training, inference) proposals kept of each image after it.
        nms_thresh: IoU of the per-level NMS.
        min_box_size: both sides of a proposal are longer, in pixels.
        bbox_reg_weights: multipliers of (dx, dy, dw, dh).
        box_reg_loss_type: one of ``cascade_det.core.losses.BOX_LOSSES``.
        smooth_l1_beta: 0 is L1.
        loss_weights: factors of ``loss_rpn_cls`` and ``loss_rpn_loc``.
    """

    def __init__(
        self,
        *,
        in_features: Sequence[str],
        in_channels: int,
        strides: Sequence[int],
        anchor_sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[Sequence[float]],
        anchor_offset: float,
        conv_dims: Sequence[int],
        iou_thresholds: tuple[float, float],
        batch_size_per_image: int,
        positive_fraction: float,
        pre_nms_topk: tuple[int, int],
        post_nms_topk: tuple[int, int],
        nms_thresh: float,
        min_box_size: float,
        bbox_reg_weights: Weights,
        box_reg_loss_type: str,
        smooth_l1_beta: float,
        loss_weights: dict[str, float],
    ) -> None:
        super().__init__()
        self.in_features = tuple(in_features)
        self.anchor_generator = AnchorGenerator(
            sizes=anchor_sizes, aspect_ratios=aspect_ratios, strides=strides, offset=anchor_offset
        )
        self.rpn_head = RPNHead(
            in_channels=in_channels,
            num_anchors=self.anchor_generator.num_cell_anchors,
            conv_dims=conv_dims,
        )
        self.iou_thresholds = iou_thresholds
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.pre_nms_topk = pre_nms_topk
        self.post_nms_topk = post_nms_topk
        self.nms_thresh = nms_thresh
        self.min_box_size = min_box_size
        self.bbox_reg_weights = bbox_reg_weights
        self.box_reg_loss_type = box_reg_loss_type
        self.smooth_l1_beta = smooth_l1_beta
        self.loss_weights = loss_weights
        self.metrics: dict[str, Tensor] = {}

    def losses(
        self, features: dict[str, Tensor], gt_boxes: Sequence[Tensor], image_sizes: ImageSizes
    ) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
        """Proposals for training the heads, the logits of their objectness, and the losses.

        These are ``loss_rpn_cls`` and ``loss_rpn_loc``.

        Args:
            features: pyramid maps by name.
            gt_boxes: per image float32 ``[G_i, 4]``.
            image_sizes: N ``(height, width)``.

        Proposals that are NaN or Inf are left out, and counted in ``metrics``.
        """
        anchors, logits, deltas = self._run_head(features)
        all_anchors = torch.cat(anchors)
        labelled = [self._label_anchors(all_anchors, boxes) for boxes in gt_boxes]
        labels = torch.stack([labels for labels, _ in labelled])
        targets = torch.stack([targets for _, targets in labelled])
        losses = self._losses(
            all_anchors, torch.cat(logits, 1), torch.cat(deltas, 1), labels, targets
        )
        proposals, objectness = self._propose(anchors, logits, deltas, image_sizes, training=True)
        return proposals, objectness, losses

    def propose(
        self, features: dict[str, Tensor], image_sizes: ImageSizes
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Proposals for inference.

        Returns:
            per image float32 ``[R_i, 4]``, by falling objectness, clipped to the image; and the
            logits of their objectness, float32 ``[R_i]``.
        """
        anchors, logits, deltas = self._run_head(features)
        return self._propose(anchors, logits, deltas, image_sizes, training=False)

    def _run_head(
        self, features: dict[str, Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        levels = [features[name] for name in self.in_features]
        anchors = self.anchor_generator([(x.shape[-2], x.shape[-1]) for x in levels])
        logits, deltas = self.rpn_head(levels)
        return anchors, [x.float() for x in logits], [x.float() for x in deltas]

    @torch.no_grad()
    def _label_anchors(self, anchors: Tensor, gt_boxes: Tensor) -> tuple[Tensor, Tensor]:
        """1 for a sampled object, 0 for sampled background, -1 for the rest; and matched boxes."""
        if len(gt_boxes) == 0:
            labels = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
            matched_boxes = torch.zeros_like(anchors)
        else:
            overlaps = box_iou(gt_boxes, anchors)
            best, matched = overlaps.max(dim=0)
            low, high = self.iou_thresholds
            labels = torch.full_like(matched, -1)
            labels[best < low] = 0
            labels[best >= high] = 1
            # Section 3.1.2: the best anchors of every object are positive, however poor.
            best_of_gt = overlaps.max(dim=1, keepdim=True).values
            labels[(overlaps == best_of_gt).any(dim=0)] = 1
            matched_boxes = gt_boxes[matched]
        positive, negative = sample_labels(
            labels,
            num_samples=self.batch_size_per_image,
            positive_fraction=self.positive_fraction,
            negative_label=0,
        )
        sampled = torch.full_like(labels, -1)
        sampled[positive] = 1
        sampled[negative] = 0
        return sampled, matched_boxes

    def _losses(
        self, anchors: Tensor, logits: Tensor, deltas: Tensor, labels: Tensor, targets: Tensor
    ) -> dict[str, Tensor]:
        positive, valid = labels == 1, labels >= 0
        location = box_loss(
            deltas[positive],
            anchors.expand_as(targets)[positive],
            targets[positive],
            weights=self.bbox_reg_weights,
            loss_type=self.box_reg_loss_type,
            smooth_l1_beta=self.smooth_l1_beta,
        )
        objectness = F.binary_cross_entropy_with_logits(
            logits[valid], labels[valid].float(), reduction="sum"
        )
        losses = {"loss_rpn_cls": objectness, "loss_rpn_loc": location}
        normalizer = self.batch_size_per_image * len(labels)
        return {name: x / normalizer * self.loss_weights[name] for name, x in losses.items()}

    @torch.no_grad()
    def _propose(
        self,
        anchors: list[Tensor],
        logits: list[Tensor],
        deltas: list[Tensor],
        image_sizes: ImageSizes,
        *,
        training: bool,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Top-k of each level, decoded, clipped, non-empty, after NMS within the level."""
        mode = 0 if training else 1
        scores, boxes, levels = [], [], []
        for level, (a, logit, delta) in enumerate(zip(anchors, logits, deltas, strict=True)):
            count = min(logit.shape[1], self.pre_nms_topk[mode])
            top, index = logit.topk(count, dim=1)
            # Only the chosen anchors are decoded.
            chosen = delta.gather(1, index[..., None].expand(-1, -1, 4))
            decoded = decode_boxes(
                chosen.reshape(-1, 4), a[index].reshape(-1, 4), self.bbox_reg_weights
            )
            scores.append(top)
            boxes.append(decoded.view(len(top), count, 4))
            levels.append(torch.full((count,), level, device=top.device))
        all_scores, all_boxes, level_index = (
            torch.cat(scores, 1),
            torch.cat(boxes, 1),
            torch.cat(levels),
        )
        finite = torch.isfinite(all_boxes).all(dim=2) & torch.isfinite(all_scores)
        if training:
            self.metrics = {"rpn/nonfinite_boxes": (~finite).sum()}
        limits = image_limits(image_sizes, torch.arange(len(image_sizes), device=all_boxes.device))
        proposals, objectness = [], []
        for image in range(len(image_sizes)):
            clipped = clip_boxes(all_boxes[image], limits[image].expand(all_boxes.shape[1], 4))
            keep = finite[image] & is_nonempty(clipped, self.min_box_size)
            clipped, finite_scores = clipped[keep], all_scores[image][keep]
            kept = batched_nms(clipped, finite_scores, level_index[keep], self.nms_thresh)
            kept = kept[: self.post_nms_topk[mode]]
            proposals.append(clipped[kept])
            objectness.append(finite_scores[kept])
        return proposals, objectness
