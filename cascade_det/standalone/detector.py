"""A whole detector without Detectron2, with Detectron2's names in its state dict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cascade_det.backbones import FPN, CascadeFPN, EfficientViTFPN
from cascade_det.core import (
    CascadeHead,
    CascadeInputs,
    CascadeStats,
    DetectorOutput,
    ExitPolicy,
    PartTimer,
)
from cascade_det.core.full_proposals import full_proposals
from cascade_det.core.modes import in_evaluation_mode
from cascade_det.core.postprocess import rescale_detections, rescale_stage
from cascade_det.core.recorded_tiles import TileProposals
from cascade_det.core.structures import ImageTiles, measure_tiles, part
from cascade_det.core.tile_losses import TileOrigins
from cascade_det.data.samples import Sample
from cascade_det.engine.batches import check_images
from cascade_det.engine.precision import channels_last_in_half
from cascade_det.layers.rpn_head import TileScorer
from cascade_det.layers.tiles import TILE, FeatureMap, TiledMap, as_tensor
from cascade_det.masks.truth import ObjectMasks
from cascade_det.standalone.front import SIZE_STEP, Front
from cascade_det.standalone.preprocess import normalise_and_stack, send
from cascade_det.standalone.rpn import RPN, Candidates, Proposals


class Detector(nn.Module):
    """Images in, losses or detections out.

    Args:
        backbone: a batch of images to feature maps by name.
        proposal_generator: the RPN.
        roi_heads: the cascade.
        roi_in_features: names of the feature maps that the cascade pools, finest first.
        pixel_mean: of each channel, in the channel order of the images.
        pixel_std: of each channel, in the same order.

    Attributes:
        optimizations: the changes made by ``cascade_det.standalone.optimize``, one sentence each;
            empty before it. An optimised detector cannot be trained.
        compiled_front: computes maps and candidates in place of backbone and RPN, in a compiled
            call; ``None`` if that is not compiled on a GPU.
        dtype: the types that inference computes in, for a report.
        memory_format: of the batch of images in inference, and in training in float32 on a GPU.
            In half precision it is channels-last there.
        training_format: of the batch of images in training on a CPU, where channels-last maps are
            faster. Rounding differs from that on contiguous maps.
    """

    def __init__(
        self,
        *,
        backbone: FPN | CascadeFPN | EfficientViTFPN,
        proposal_generator: RPN,
        roi_heads: CascadeHead,
        roi_in_features: Sequence[str],
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.proposal_generator = proposal_generator
        self.roi_heads = roi_heads
        self.roi_in_features = tuple(roi_in_features)
        backbone.freeze_unread({*proposal_generator.in_features, *roi_in_features})
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        mean, std = torch.tensor(pixel_mean), torch.tensor(pixel_std)
        self.optimizations: list[str] = []
        self.dtype = "float32"
        self.compiled_front: Front | None
        self.use_front(None)
        self.memory_format = torch.contiguous_format
        self.training_format = torch.channels_last
        self.register_buffer("pixel_mean", mean.view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", std.view(-1, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.pixel_mean.device

    @property
    def cascade(self) -> CascadeHead:
        """The cascade: the same as ``roi_heads``."""
        return self.roi_heads

    def set_exits(self, exits: ExitPolicy | None) -> None:
        """Replace the exit policy; ``None`` for no exits."""
        self.roi_heads.exits = exits

    def use_front(self, front: Front | None) -> None:
        """Compute maps and candidates by a compiled ``front`` of the same backbone and RPN."""
        # Not a submodule: its parts have their names already.
        self.__dict__["compiled_front"] = front

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Scalars to log beside the losses, from the last call of ``losses``."""
        return {**self.proposal_generator.metrics, **self.roi_heads.metrics}

    def forward(self, batch: Sequence[Sample]) -> dict[str, Tensor]:
        """The same as ``losses``, for wrappers that call ``forward``."""
        return self.losses(batch)

    def losses(self, batch: Sequence[Sample]) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            batch: samples with ``image`` (uint8 ``[3, H, W]``), ``gt_boxes`` (float32 ``[G, 4]``,
                XYXY in pixels of the image), ``gt_classes`` (int64 ``[G]``) and, for a detector
                with masks, ``gt_masks`` (see ``cascade_det.masks.truth``).

        Returns:
            Scalars by Detectron2's names; training minimises their sum.

        Raises:
            RuntimeError: the detector was optimised for inference.
            ValueError: the batch is empty, or ``detect`` refuses one of its images.
        """
        if self.optimizations:
            raise RuntimeError(
                "an optimised detector cannot be trained: its norms are folded and its weights "
                "converted. Build it again without optimize() and without "
                "MODEL.CASCADE.FAST.ENABLED"
            )
        if len(batch) == 0:
            raise ValueError("the batch is empty: losses need at least one image")
        check_images(batch)
        gt_boxes = send([s["gt_boxes"] for s in batch], self.device)
        gt_classes = send([s["gt_classes"] for s in batch], self.device)
        if self.roi_heads.regime.exits_alone:
            inputs, origins = self._inputs_with_origins(batch)
            return self.roi_heads.exit_losses(inputs, gt_boxes, gt_classes, origins)
        images, image_sizes = self.preprocess([s["image"] for s in batch])
        if images.device.type == "cpu":
            images = images.contiguous(memory_format=self.training_format)
        images = channels_last_in_half(images)
        maps = self.backbone(images)
        proposals, losses = self.proposal_generator.losses(maps, gt_boxes, image_sizes)
        features = [maps[name] for name in self.roi_in_features]
        gt_masks = None
        if self.roi_heads.masks is not None:
            gt_masks = ObjectMasks([mask for s in batch for mask in s["gt_masks"]], self.device)
        losses.update(
            self.roi_heads.losses(
                features, proposals.boxes, gt_boxes, gt_classes, image_sizes, gt_masks
            )
        )
        inputs = CascadeInputs(features, proposals.boxes, image_sizes, proposals.objectness)
        origins = self._origins(maps, proposals)
        return {**losses, **self.roi_heads.exit_losses(inputs, gt_boxes, gt_classes, origins)}

    @in_evaluation_mode
    @torch.no_grad()
    def detect(
        self,
        batch: Sequence[Sample],
        *,
        stages: bool | Sequence[bool] = False,
        timer: PartTimer | None = None,
    ) -> DetectorOutput:
        """Detect objects in a batch.

        Runs in evaluation mode and restores the mode of every module afterwards.

        Args:
            batch: samples with ``image`` (uint8 ``[3, H, W]``) and, if it was resized, ``height``
                and ``width`` of the original.
            stages: also run the full cascade, without a tile gate, and report the detections
                after every stage: of all images, or of those for which it is true; the others get
                empty ones.
            timer: measures the milliseconds of every part.

        Returns:
            Detections in pixels of the original images.

        Raises:
            ValueError: an image is not a tensor ``[3, H, W]``, or has no pixels.
        """
        if len(batch) == 0:
            return DetectorOutput([], CascadeStats.empty(self.roi_heads.num_stages))
        started = self.roi_heads.now()
        maps, inputs = self._cascade_inputs(batch, timer, gated=True)
        detections, stats = self.roi_heads.detect(**vars(inputs), timer=timer, started=started)
        image_sizes = inputs.image_sizes
        frames = [
            (size, (s.get("height", size[0]), s.get("width", size[1])))
            for s, size in zip(batch, image_sizes, strict=True)
        ]
        with part(timer, "postprocess"):
            detections = rescale_detections(detections, frames)
        finest = maps[self.roi_in_features[0]]
        tiles = self._image_tiles(finest, frames) if isinstance(finest, TiledMap) else None
        output = DetectorOutput(detections, stats, tiles=tiles)
        chosen = [stages] * len(batch) if isinstance(stages, bool) else stages
        if any(chosen):

            def propose(own: dict[str, Tensor], images: slice) -> list[Tensor]:
                return self.proposal_generator.propose(own, image_sizes[images])[0]

            whole, proposals = full_proposals(maps, inputs.proposals, chosen, propose, timer=timer)
            features = [whole[name] for name in self.roi_in_features]
            full = self.roi_heads.detect_stages(features, proposals, image_sizes, timer=timer)
            output.stages = [rescale_stage(stage, frames) for stage in full]
        return output

    @in_evaluation_mode
    @torch.no_grad()
    def cascade_inputs(self, batch: Sequence[Sample]) -> CascadeInputs:
        """Inputs of the cascade for a batch, as in ``detect`` without a tile gate."""
        _, inputs = self._cascade_inputs(batch, None, gated=False)
        if self.compiled_front is not None:
            # The next call of a recording writes over the maps of this one.
            inputs = replace(inputs, features=[as_tensor(x).clone() for x in inputs.features])
        return inputs

    @in_evaluation_mode
    @torch.no_grad()
    def gated_inputs(
        self, batch: Sequence[Sample], tile_thresholds: Sequence[float]
    ) -> tuple[CascadeInputs, TileProposals | None]:
        """Inputs of a record at some tile thresholds, see ``engine.detector.CascadeDetector``."""
        if not tile_thresholds or not self._takes_tiles:
            return self.cascade_inputs(batch), None
        mode = torch.inference_mode if self.optimizations else nullcontext
        with mode():
            check_images(batch)
            images, image_sizes = self.preprocess([s["image"] for s in batch])
            maps = self.backbone(images)
        boxes, objectness, tiles = self.proposal_generator.propose_at(
            maps, image_sizes, tile_thresholds, tile_scorer=self._tile_scorer
        )
        features = [maps[name] for name in self.roi_in_features]
        return CascadeInputs(features, boxes, image_sizes, objectness), tiles

    @in_evaluation_mode
    @torch.no_grad()
    def _inputs_with_origins(
        self, batch: Sequence[Sample]
    ) -> tuple[CascadeInputs, TileOrigins | None]:
        """As ``cascade_inputs``, with what a tile head is trained with."""
        images, image_sizes = self.preprocess([s["image"] for s in batch])
        maps = self.backbone(images)
        proposals = self.proposal_generator.propose_with_tiles(maps, image_sizes)
        features = [maps[name] for name in self.roi_in_features]
        inputs = CascadeInputs(features, proposals.boxes, image_sizes, proposals.objectness)
        return inputs, self._origins(maps, proposals)

    def _origins(self, maps: dict[str, Tensor], proposals: Proposals) -> TileOrigins | None:
        """What a tile head is trained with; ``None`` without one."""
        if self._tile_scorer is None:
            return None
        return TileOrigins(self.proposal_generator.after_finest(maps), proposals.tiles)

    @property
    def _tile_scorer(self) -> TileScorer | None:
        exits = self.roi_heads.exits
        return None if exits is None else exits.tile_scorer

    @property
    def _takes_tiles(self) -> bool:
        finest, rpn = self.roi_in_features[0], self.proposal_generator
        return (
            self.compiled_front is None
            and isinstance(self.backbone, FPN)
            and self.backbone.takes_tiles
            and rpn.rpn_head.takes_tiles
            and rpn.in_features[0] == finest == f"p{self.backbone.levels[0]}"
            and len(rpn.in_features) > 1
        )

    def _cascade_inputs(
        self, batch: Sequence[Sample], timer: PartTimer | None, *, gated: bool
    ) -> tuple[dict[str, FeatureMap], CascadeInputs]:
        """The feature maps of a batch by name, and what the cascade gets of them."""
        # A compiled backbone is compiled for inference mode only.
        mode = torch.inference_mode if self.optimizations else nullcontext
        exits = self.roi_heads.exits if gated else None
        tile_threshold = 0.0 if exits is None else exits.tile_threshold
        with part(timer, "preprocess"), mode():
            check_images(batch)
            images, image_sizes = self.preprocess([s["image"] for s in batch])
        with part(timer, "backbone"), mode():
            in_tiles = tile_threshold > 0 and isinstance(self.backbone, FPN)
            maps, candidates = self._front(images, in_tiles=in_tiles)
        measure_tiles(maps, timer)
        with part(timer, "rpn"):
            if candidates is None:
                candidates = self.proposal_generator.candidates(
                    maps, tile_threshold=tile_threshold, tile_scorer=self._tile_scorer
                )
            proposals, objectness = self.proposal_generator.select(candidates, image_sizes)
        features = [maps[name] for name in self.roi_in_features]
        return maps, CascadeInputs(features, proposals, image_sizes, objectness)

    def _image_tiles(
        self, finest: TiledMap, frames: Sequence[tuple[tuple[int, int], tuple[int, int]]]
    ) -> list[ImageTiles]:
        """The tiles of images, of which ``frames`` has the resized and the original size."""
        side = TILE * self.roi_heads.pooler.strides[0]  # pixels of a resized image
        return [
            ImageTiles(opened, computed, side * size[0] / own[0], side * size[1] / own[1])
            for opened, computed, (own, size) in zip(
                finest.opened, finest.computed, frames, strict=True
            )
        ]

    def _front(self, images: Tensor, *, in_tiles: bool) -> tuple[dict[str, Any], Candidates | None]:
        if self.compiled_front is None:
            # Other pyramids have no tiles.
            return self.backbone(images, in_tiles=True) if in_tiles else self.backbone(images), None
        maps, candidates = self.compiled_front(images)
        return maps, candidates

    def preprocess(self, images: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Normalise, pad with 0 on the right and at the bottom, and stack.

        Args:
            images: N of uint8 ``[3, H_i, W_i]``.

        Returns:
            float32 ``[N, 3, H, W]``, with H and W multiples of the backbone's
            ``size_divisibility``, and of ``SIZE_STEP`` with a compiled front; and ``(H_i, W_i)``
            of every image.
        """
        step = self.backbone.size_divisibility
        if self.compiled_front is not None:
            step = math.lcm(step, SIZE_STEP)
        return normalise_and_stack(
            images,
            self.pixel_mean,
            self.pixel_std,
            step=step,
            memory_format=self.memory_format,
        )
