"""Region proposal network (Faster R-CNN, arXiv 1506.01497, section 3), equal to Detectron2's.

Shapes: N images, L levels, A anchors at each position, G ground-truth boxes of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou

from cascade_det.core.losses import box_loss
from cascade_det.core.matching import sample_labels
from cascade_det.core.recorded_tiles import TileProposals, join_proposals
from cascade_det.core.structures.boxes import (
    ImageSizes,
    Weights,
    clip_boxes,
    decode_boxes,
    image_bounds,
    is_nonempty,
)
from cascade_det.core.structures.nms import nms_by_image
from cascade_det.layers.rpn_head import BestAnchors, RPNHead, TileScorer
from cascade_det.layers.tiles import TILE, FeatureMap
from cascade_det.standalone.anchors import AnchorGenerator
from cascade_det.standalone.rpn_samples import predictions_at


class Candidates(NamedTuple):
    """The best anchors of all levels, before NMS.

    Attributes:
        boxes: float32 ``[N, K, 4]``, XYXY pixels, decoded but not clipped.
        logits: float32 ``[N, K]``, objectness.
        level_index: int64 ``[N, K]``.
    """

    boxes: Tensor
    logits: Tensor
    level_index: Tensor


class Proposals(NamedTuple):
    """Proposals of N images, best objectness first.

    Attributes:
        boxes: per image float32 ``[R_i, 4]``, XYXY clipped to the image.
        objectness: per image float32 ``[R_i]``, logits.
        tiles: per image int64 ``[R_i]``, the tile of the finest map that has the cell of the
            anchor, row by row; -1 for anchors of coarser maps.
    """

    boxes: list[Tensor]
    objectness: list[Tensor]
    tiles: list[Tensor]


class RPN(nn.Module):
    """Scores anchors and turns the best into proposals.

    Args:
        in_features: names of the pyramid levels, finest first.
        in_channels: C of the levels.
        strides: of the levels in pixels.
        anchor_sizes: of each level in pixels.
        aspect_ratios: of each level, height / width.
        anchor_offset: see ``AnchorGenerator``.
        conv_dims: see ``RPNHead``.
        iou_thresholds: anchors below the first are background, from the second on foreground.
        batch_size_per_image: anchors sampled for the loss from each image.
        positive_fraction: upper bound of the share of foreground among them.
        pre_nms_topk: (training, inference) proposals of a level kept before NMS.
        post_nms_topk: (training, inference) proposals of an image kept after NMS.
        nms_thresh: IoU threshold of the per-level NMS.
        min_box_size: pixels; proposals with a side of at most this length are dropped.
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
    ) -> tuple[Proposals, dict[str, Tensor]]:
        """Proposals for training the heads, and the losses of the RPN.

        Proposals that are NaN or Inf are dropped, and counted in ``metrics``.

        Args:
            features: feature maps by name.
            gt_boxes: per image float32 ``[G_i, 4]``, XYXY in pixels.
            image_sizes: N ``(height, width)``.

        Returns:
            The proposals, and the losses ``loss_rpn_cls`` and ``loss_rpn_loc``.
        """
        levels = [features[name] for name in self.in_features]
        anchors = torch.cat(self.anchor_generator([(x.shape[-2], x.shape[-1]) for x in levels]))
        labelled = [self._label_anchors(anchors, boxes) for boxes in gt_boxes]
        labels = torch.stack([labels for labels, _ in labelled])
        targets = torch.stack([targets for _, targets in labelled])
        # Before the proposals: autocast caches converted weights at their first use, and those
        # converted under no_grad have no gradients.
        losses = self._losses(levels, anchors, labels, targets)
        return self._propose(levels, image_sizes, mode=0), losses

    def propose(
        self, features: dict[str, Tensor], image_sizes: ImageSizes
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Proposals for inference.

        Args:
            features: feature maps by name.
            image_sizes: N ``(height, width)``.

        Returns:
            Per image float32 ``[R_i, 4]``, XYXY clipped to the image, best objectness first, and
            objectness logits float32 ``[R_i]``.
        """
        return self.select(self.candidates(features), image_sizes)

    def propose_with_tiles(
        self, features: Mapping[str, Tensor], image_sizes: ImageSizes
    ) -> Proposals:
        """As ``propose``, with the tiles that proposals come from."""
        return self._propose([features[name] for name in self.in_features], image_sizes, mode=1)

    @torch.no_grad()
    def after_finest(self, features: Mapping[str, Tensor]) -> Tensor:
        """The hidden map of the level after the finest, that of a ``TileScorer``."""
        return self.rpn_head.hidden(features[self.in_features[1]])

    @torch.no_grad()
    def candidates(
        self,
        features: Mapping[str, FeatureMap],
        *,
        tile_threshold: float = 0.0,
        tile_scorer: TileScorer | None = None,
    ) -> Candidates:
        """The best anchors of every level, for inference; their shapes follow from the maps.

        Args:
            features: feature maps by name; the finest may be a ``TiledMap``.
            tile_threshold: see ``RPNHead.best``.
            tile_scorer: see ``RPNHead.best``.
        """
        levels = [features[name] for name in self.in_features]
        best = self.rpn_head.best(
            levels, self.pre_nms_topk[1], tile_threshold=tile_threshold, tile_scorer=tile_scorer
        )
        return self._decoded(best, levels)

    @torch.no_grad()
    def propose_at(
        self,
        features: Mapping[str, Tensor],
        image_sizes: ImageSizes,
        thresholds: Sequence[float],
        *,
        tile_scorer: TileScorer | None = None,
    ) -> tuple[list[Tensor], list[Tensor], TileProposals]:
        """Proposals for inference at some tile thresholds together, see ``RPNHead.best_at``.

        Returns:
            Boxes and objectness as of ``propose``, and which belong to each threshold.
        """
        levels = [features[name] for name in self.in_features]
        found = self.rpn_head.best_at(
            levels, self.pre_nms_topk[1], thresholds, tile_scorer=tile_scorer
        )
        selected = [self.select(self._decoded(x.best, levels), image_sizes) for x in found]
        return join_proposals(selected, thresholds, [x.opened for x in found])

    def select(
        self, candidates: Candidates, image_sizes: ImageSizes
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Proposals for inference among candidates; for the rest see ``propose``."""
        boxes, objectness, _ = self._select(candidates, image_sizes, mode=1)
        return boxes, objectness

    @torch.no_grad()
    def _label_anchors(self, anchors: Tensor, gt_boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Labels and matched boxes of M anchors for one image.

        Returns:
            int64 ``[M]``: 1 for sampled foreground, 0 for sampled background, -1 for the rest; and
            float32 ``[M, 4]``.
        """
        if len(gt_boxes) == 0:
            labels = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
            matched_boxes = torch.zeros_like(anchors)
        else:
            overlaps = box_iou(gt_boxes, anchors)  # [G, M]
            best, matched = overlaps.max(dim=0)
            low, high = self.iou_thresholds
            labels = torch.full_like(matched, -1)
            labels[best < low] = 0
            labels[best >= high] = 1
            # Section 3.1.2: the best anchors of every object are positive at any IoU.
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
        # Unlike an assignment, this sends no number to the device.
        sampled.index_fill_(0, positive, 1).index_fill_(0, negative, 0)
        return sampled, matched_boxes

    def _losses(
        self, levels: Sequence[Tensor], anchors: Tensor, labels: Tensor, targets: Tensor
    ) -> dict[str, Tensor]:
        image, anchor = torch.nonzero(labels >= 0).unbind(1)
        logits, deltas = predictions_at(self.rpn_head, levels, image, anchor)
        is_foreground = labels[image, anchor] == 1  # [S]
        positive = torch.nonzero(is_foreground).squeeze(1)
        location = box_loss(
            deltas[positive],
            anchors[anchor[positive]],
            targets[image[positive], anchor[positive]],
            weights=self.bbox_reg_weights,
            loss_type=self.box_reg_loss_type,
            smooth_l1_beta=self.smooth_l1_beta,
        )
        objectness = F.binary_cross_entropy_with_logits(
            logits.float(), is_foreground.float(), reduction="sum"
        )
        losses = {"loss_rpn_cls": objectness, "loss_rpn_loc": location}
        normalizer = self.batch_size_per_image * len(labels)
        return {name: x / normalizer * self.loss_weights[name] for name, x in losses.items()}

    @torch.no_grad()
    def _propose(
        self, levels: Sequence[Tensor], image_sizes: ImageSizes, *, mode: int
    ) -> Proposals:
        """Score anchors, decode the best ones and select among them.

        Args:
            levels: L maps ``[N, C, H_l, W_l]``.
            image_sizes: N ``(height, width)``.
            mode: 0 in training, 1 in inference.
        """
        best = self.rpn_head.best(levels, self.pre_nms_topk[mode])
        boxes, objectness, rows = self._select(self._decoded(best, levels), image_sizes, mode=mode)
        width = levels[0].shape[-1]
        cell = best[0].anchor_index // self.rpn_head.objectness_logits.out_channels  # [N, K_0]
        tile = cell // width // TILE * -(-width // TILE) + cell % width // TILE
        coarser = sum(level.logits.shape[1] for level in best[1:])
        tiles = F.pad(tile, (0, coarser), value=-1).flatten()  # [N K]
        return Proposals(boxes, objectness, [tiles[own] for own in rows])

    def _decoded(self, best: Sequence[BestAnchors], levels: Sequence[FeatureMap]) -> Candidates:
        scores = torch.cat([level.logits for level in best], 1)  # [N, K]
        deltas = torch.cat([level.deltas for level in best], 1)  # [N, K, 4]
        anchors = torch.cat(
            [
                self.anchor_generator.at(level, chosen.anchor_index, levels[level].shape[-1])
                for level, chosen in enumerate(best)
            ],
            dim=1,
        )
        boxes = decode_boxes(deltas.flatten(0, 1), anchors.flatten(0, 1), self.bbox_reg_weights)
        level_index = torch.cat(
            [torch.full_like(b.anchor_index, level) for level, b in enumerate(best)], dim=1
        )  # [N, K]
        return Candidates(boxes.view_as(anchors), scores, level_index)

    @torch.no_grad()
    def _select(
        self, candidates: Candidates, image_sizes: ImageSizes, *, mode: int
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Clip boxes, drop empty ones, and apply NMS within each level.

        Per image: boxes, logits, and the places among all N K candidates.

        Args:
            candidates: of N images.
            image_sizes: N ``(height, width)``.
            mode: 0 in training, 1 in inference.
        """
        boxes, scores, level_index = candidates
        finite = torch.isfinite(boxes).all(dim=2) & torch.isfinite(scores)
        if mode == 0:
            self.metrics = {"rpn/nonfinite_boxes": (~finite).sum()}
        clipped = clip_boxes(boxes, image_bounds(image_sizes, boxes))
        keep = finite.flatten() & is_nonempty(clipped.flatten(0, 1), self.min_box_size)
        num_images = len(image_sizes)
        images = torch.arange(num_images, device=scores.device)[:, None].expand_as(scores)
        boxes, logits = clipped.flatten(0, 1), scores.flatten()
        best_first = nms_by_image(
            boxes,
            logits,
            images.flatten().where(keep, num_images),
            level_index.flatten(),
            num_images=num_images,
            num_classes=len(self.in_features),
            iou=self.nms_thresh,
        )
        rows = [own[: self.post_nms_topk[mode]] for own in best_first]
        return [boxes[own] for own in rows], [logits[own] for own in rows], rows
