"""A model of Detectron2 with the interface of a detector that the engine uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from cascade_det.core import (
    CascadeHead,
    CascadeInputs,
    CascadeStats,
    DetectorOutput,
    ExitPolicy,
    PartTimer,
    TrainingSchedule,
)
from cascade_det.core.fast_heads import head_dtypes
from cascade_det.core.full_proposals import full_proposals
from cascade_det.core.modes import evaluation_mode, in_evaluation_mode
from cascade_det.core.postprocess import rescale_stage
from cascade_det.core.recorded_tiles import TileProposals
from cascade_det.core.structures import measure_tiles, part
from cascade_det.d2.heads_call import HeadsCall
from cascade_det.d2.roi_heads import EarlyExitCascadeROIHeads
from cascade_det.d2.structures import postprocess, to_detections
from cascade_det.data.samples import Sample
from cascade_det.engine.batches import check_images
from cascade_det.engine.devices import describe_dtypes, weight_dtypes
from cascade_det.layers.tiles import FeatureMap


class Detector(nn.Module):
    """A model of Detectron2: its inputs in, losses or detections out.

    Args:
        model: any model of Detectron2.

    Attributes:
        outputs: the model's own outputs in the last call of :meth:`detect`.
        has_stages: whether the model is an R-CNN with our heads. Any other runs as a whole:
            without exits, stages and times of parts.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.outputs: list[dict[str, Instances]] = []
        # An overridden method may do more than run the parts one after another.
        is_plain = all(
            getattr(type(model), name, None) is getattr(GeneralizedRCNN, name)
            for name in ("forward", "inference", "preprocess_image", "_postprocess")
        )
        heads = getattr(model, "roi_heads", None)
        self.has_stages = is_plain and isinstance(heads, EarlyExitCascadeROIHeads)

    def losses(self, batch: Sequence[Sample]) -> dict[str, Tensor]:
        """Losses of a batch; norms and dropout stay in their mode, and nothing is logged.

        Args:
            batch: samples with ``image`` and ``instances``, the ground truth.

        Returns:
            Scalars by Detectron2's names.

        Raises:
            ValueError: the batch is empty, or ``detect`` refuses one of its images.
        """
        if len(batch) == 0:
            raise ValueError("the batch is empty: losses need at least one image")
        check_images(batch, image_channels(self.model))
        with training_heads(self.model), EventStorage():
            return self.model(batch)

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
            batch: samples with ``image`` and, if it was resized, ``height`` and ``width`` of the
                original.
            stages: also run the full cascade, without a tile gate, and report the detections
                after every stage: of all images, or of those for which it is true; the others get
                empty ones. Only where ``has_stages``.
            timer: measures the milliseconds of every part.

        Returns:
            Detections in pixels of the original images.

        Raises:
            ValueError: an image is not a tensor ``[3, H, W]``, or has no pixels.
        """
        if len(batch) == 0:
            self.outputs = []
            num_stages = self._heads.num_cascade_stages if self.has_stages else 0
            return DetectorOutput([], CascadeStats.empty(num_stages))
        check_images(batch, image_channels(self.model))
        if self.has_stages:
            chosen = [stages] * len(batch) if isinstance(stages, bool) else stages
            return self._detect_in_parts(batch, chosen, timer)
        with part(timer, "model"):
            outputs = self.model(batch)
        self.outputs = outputs
        detections = [to_detections(output["instances"]) for output in outputs]
        return DetectorOutput(detections, CascadeStats([], []))

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.model.parameters()).device

    @property
    def cascade(self) -> CascadeHead:
        """The cascade, where ``has_stages``."""
        heads = self._heads
        heads.follow_predictors()
        return heads.cascade

    @property
    def dtype(self) -> str:
        """The types that inference computes in, for a report."""
        if hasattr(self.model, "optimizations"):
            return str(self.model.dtype)
        if not self.has_stages:
            return describe_dtypes(weight_dtypes(self.model.named_children()))
        with evaluation_mode(self):  # in training mode the heads are not the fast ones
            heads = head_dtypes(self.cascade.box_head)
        before = [
            ("all before", part)
            for name, part in self.model.named_children()
            if name != "roi_heads"
        ]
        return describe_dtypes([*(("roi_heads", dtype) for dtype in heads), *weight_dtypes(before)])

    def set_exits(self, exits: ExitPolicy | None) -> None:
        """Replace the exit policy; ``None`` for no exits. Only where ``has_stages``."""
        self._heads.exits = exits

    @in_evaluation_mode
    @torch.no_grad()
    def cascade_inputs(self, batch: Sequence[Sample]) -> CascadeInputs:
        """Inputs of the cascade for a batch, as in ``detect`` without a tile gate.

        Only where ``has_stages``.
        """
        check_images(batch, image_channels(self.model))
        with HeadsCall(whole_maps=True).within():
            _, maps, proposals = self._propose(batch, None)
        return self._heads.cascade_inputs(maps, proposals)

    @in_evaluation_mode
    @torch.no_grad()
    def gated_inputs(
        self, batch: Sequence[Sample], tile_thresholds: Sequence[float]
    ) -> tuple[CascadeInputs, TileProposals | None]:
        """Inputs of a record at some tile thresholds, see ``engine.detector.CascadeDetector``."""
        model: Any = self.model
        rpn = model.proposal_generator
        if not tile_thresholds or getattr(rpn, "tile_threshold", None) is None:
            return self.cascade_inputs(batch), None
        check_images(batch, image_channels(model))
        with HeadsCall(whole_maps=True).within():
            images = model.preprocess_image(batch)
            maps = model.backbone(images.tensor)
            proposals, objectness, tiles = rpn.propose_at(images, maps, tile_thresholds)
        features = [maps[name] for name in self._heads.box_in_features]
        return CascadeInputs(features, proposals, list(images.image_sizes), objectness), tiles

    @property
    def _heads(self) -> EarlyExitCascadeROIHeads:
        model: Any = self.model
        heads: EarlyExitCascadeROIHeads = model.roi_heads
        return heads

    def _propose(
        self, batch: Sequence[Sample], timer: PartTimer | None
    ) -> tuple[ImageList, dict[str, FeatureMap], list[Instances]]:
        """Images, feature maps and proposals: all parts before the heads."""
        model: Any = self.model
        with part(timer, "preprocess"):
            images = model.preprocess_image(batch)
        with part(timer, "backbone"):
            maps = model.backbone(images.tensor)
        measure_tiles(maps, timer)
        with part(timer, "rpn"):
            proposals = self._proposals(batch, images, maps)
        return images, maps, proposals

    def _proposals(
        self, batch: Sequence[Sample], images: ImageList, maps: dict[str, Any]
    ) -> list[Instances]:
        model: Any = self.model
        if model.proposal_generator is None:
            return [sample["proposals"].to(model.device) for sample in batch]
        proposals: list[Instances] = model.proposal_generator(images, maps, None)[0]
        return proposals

    def _detect_in_parts(
        self, batch: Sequence[Sample], chosen: Sequence[bool], timer: PartTimer | None
    ) -> DetectorOutput:
        heads = self._heads
        started = self.cascade.now()
        images, maps, proposals = self._propose(batch, timer)
        with HeadsCall(timer, started).within() as call:
            instances, _ = heads(images, maps, proposals, None)
        frames = [
            (size, (sample.get("height", size[0]), sample.get("width", size[1])))
            for sample, size in zip(batch, images.image_sizes, strict=True)
        ]
        with part(timer, "postprocess"):
            processed = [
                postprocess(found, *size)
                for found, (_, size) in zip(instances, frames, strict=True)
            ]
        self.outputs = [{"instances": found} for found, _ in processed]
        assert call.stats is not None
        output = DetectorOutput([detections for _, detections in processed], call.stats)
        if any(chosen):

            def propose(own: dict[str, Tensor], run: slice) -> list[Instances]:
                some = ImageList(images.tensor[run], images.image_sizes[run])
                return self._proposals(batch[run], some, own)

            whole, of_all = full_proposals(maps, proposals, chosen, propose, timer=timer)
            inputs = heads.cascade_inputs(whole, of_all)
            full = heads.cascade.detect_stages(
                inputs.features, inputs.proposals, inputs.image_sizes, timer=timer
            )
            output.stages = [rescale_stage(stage, frames) for stage in full]
        return output


def image_channels(model: nn.Module) -> int | None:
    """Channels of a model's images; ``None`` for a model without ``pixel_mean``."""
    mean = getattr(model, "pixel_mean", None)
    return len(mean) if isinstance(mean, Tensor) else None


@contextmanager
def training_heads(model: Any) -> Iterator[None]:
    """Put the modules that compute losses into training mode, but no norm and no dropout."""
    heads = getattr(model, "roi_heads", None)
    regime = getattr(heads, "regime", None)
    parts = [model, heads]
    if not isinstance(regime, TrainingSchedule) or not regime.exits_alone:
        parts.append(getattr(model, "proposal_generator", None))
    parts += [getattr(heads, name, None) for name in ("mask_head", "keypoint_head")]
    parts.append(getattr(model, "sem_seg_head", None))
    modes = [(module, module.training) for module in parts if module is not None]
    periods = [(module, module.vis_period) for module, _ in modes if hasattr(module, "vis_period")]
    for module, _ in modes:
        module.training = True
    for module, _ in periods:
        module.vis_period = 0  # no event storage would show the pictures
    try:
        yield
    finally:
        for module, period in periods:
            module.vis_period = period
        for module, training in modes:
            module.training = training
