"""Detectron2's models, with its own heads and with ours."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from detectron2 import modeling
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import cascade_rcnn
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from cascade_det.benchmark.models import (
    ModelAdapter,
    ModelOutput,
    SharedMaps,
    make_masks,
    tiles_of,
)
from cascade_det.benchmark.part_timers import PartStart, time_parts
from cascade_det.benchmark.setup import Regions, Setup
from cascade_det.benchmark.weights import draw_predictor
from cascade_det.core import Detections, ExitPolicy, PartTimer
from cascade_det.d2 import host
from cascade_det.d2.detector import Detector
from cascade_det.d2.optimize import optimize
from cascade_det.d2.roi_heads import EarlyExitCascadeROIHeads
from cascade_det.d2.structures import to_detections, to_instances
from cascade_det.data.samples import Sample
from cascade_det.errors import ConfigError

_HEADS, _FAST = "MODEL.ROI_HEADS.NAME", "MODEL.CASCADE.FAST.ENABLED"
_CLASS_AGNOSTIC = "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"
# By kind, as in Detectron2's own configurations of such models.
_OPTIONS: dict[str, tuple[Any, ...]] = {
    "plugin": (_HEADS, "EarlyExitCascadeROIHeads", _FAST, False),
    "plugin-fast": (_HEADS, "EarlyExitCascadeROIHeads", _FAST, False),
    "detectron2-cascade": (_HEADS, "CascadeROIHeads"),
    "detectron2-one-stage": (_HEADS, "StandardROIHeads", _CLASS_AGNOSTIC, False),
}


class InDetectron2(ModelAdapter):
    """A Detectron2 model with any heads.

    Args:
        model: in evaluation mode.
        maps: shared with the other models.
    """

    def __init__(self, model: Any, maps: SharedMaps) -> None:
        self.model = model
        self._has_our_heads = isinstance(model.roi_heads, EarlyExitCascadeROIHeads)
        self._maps = maps
        self._arrived = 0
        model.roi_heads.register_forward_pre_hook(self._count)

    def limit_proposals(self, count: int) -> None:
        """Let the RPN return at most ``count`` regions per image."""
        self.model.proposal_generator.post_nms_topk[False] = count

    def set_exits(self, exits: ExitPolicy | None) -> None:
        """Use these exits if the heads are ours."""
        if self._has_our_heads:
            self.model.roi_heads.exits = exits

    def prepare(
        self, batch: Sequence[Sample], regions: Regions, dtype: torch.dtype | None
    ) -> tuple[Any, dict[str, Tensor], list[Instances]]:
        """The model's own features, with given regions."""
        images, maps = self._maps.of(self.model, batch)
        if dtype is not None:
            maps = {name: x.to(dtype) for name, x in maps.items()}
        proposals = [
            Instances(size, proposal_boxes=Boxes(boxes), objectness_logits=logits)
            for size, boxes, logits in zip(
                images.image_sizes, regions.boxes, regions.objectness, strict=True
            )
        ]
        return images, maps, proposals

    def heads(self, prepared: Any) -> list[Instances]:
        """Run the RoI heads alone."""
        return self.model.roi_heads(*prepared, None)[0]

    def prepare_masks(
        self, batch: Sequence[Sample], given: Sequence[Detections], dtype: torch.dtype | None
    ) -> Any:
        """The model's own features, with given detections."""
        images, maps = self._maps.of(self.model, batch)
        if self._has_our_heads:
            cascade = Detector(self.model).cascade
            pooled = [maps[name] for name in self.model.roi_heads.box_in_features]
            return cascade, given, cascade.pyramid(pooled)
        if dtype is not None:
            maps = {name: x.to(dtype) for name, x in maps.items()}
        return maps, [to_instances(*pair) for pair in zip(given, images.image_sizes, strict=True)]

    def masks(self, prepared: Any) -> list[Tensor]:
        """Pool the detections and run the mask head alone."""
        if self._has_our_heads:
            return make_masks(*prepared)
        found = self.model.roi_heads.forward_with_given_boxes(*prepared)
        return [instances.pred_masks[:, 0] for instances in found]

    def whole(self, inputs: Sequence[Sample]) -> list[Instances]:
        """Run the whole model."""
        return [output["instances"] for output in self.model(inputs)]

    def output(self, returned: list[Instances]) -> ModelOutput:
        """Convert the instances of a call."""
        heads = self.model.roi_heads
        stages = getattr(heads, "num_cascade_stages", 1)
        detections = [to_detections(found) for found in returned]
        if not self._has_our_heads:
            return ModelOutput(detections, self._arrived, [self._arrived] * stages)
        stats = heads.stats
        return ModelOutput(detections, self._arrived, stats.entered, tiles_of(stats))

    def parts(self, inputs: Sequence[Sample], timer: PartTimer) -> None:
        """Run the whole model; the timer gets the milliseconds of its parts."""
        if self._has_our_heads:
            Detector(self.model).detect(inputs, timer=timer)
        else:
            with time_parts(timer, self._part_starts()):
                self.model(inputs)

    def _part_starts(self) -> list[PartStart]:
        model, heads = self.model, self.model.roi_heads
        starts: list[PartStart] = [
            (model, "preprocess_image", "preprocess"),
            (model.backbone, "forward", "backbone"),
            (model.proposal_generator, "forward", "rpn"),
        ]
        if hasattr(heads, "num_cascade_stages"):
            starts += [
                (heads, "_run_stage", lambda features, proposals, stage: f"stage{stage}"),
                (cascade_rcnn, "fast_rcnn_inference", "postprocess"),
            ]
        else:
            starts += [
                (heads, "_forward_box", "stage0"),
                (heads.box_predictor, "inference", "postprocess"),
            ]
        return starts

    def _count(self, heads: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._arrived = sum(len(proposals) for proposals in inputs[2])


def build_detectron2(kind: str, setup: Setup, maps: SharedMaps) -> InDetectron2:
    """Build a Detectron2 model with the weights of all models.

    A single-stage head gets those of stage 0, and random ones where shapes differ.

    Args:
        kind: "plugin", "plugin-fast", "detectron2-cascade" or "detectron2-one-stage".
        setup: what all models share.
        maps: feature maps that models in Detectron2 share.
    """
    model: Any = build_model(detectron2_cfg(kind, setup)).eval()
    load(model, setup.weights, setup.options.seed)
    setup.place(model)
    if kind == "plugin-fast":
        arguments = setup.fast_arguments()
        dtype, parts = arguments["dtype"], arguments["float32_parts"]
        optimize(model, dtype=dtype, float32_parts=parts, images=setup.fast_images)
        maps = SharedMaps(setup.options.images)  # its maps are its own
    return InDetectron2(model, maps)


def build_backbone(setup: Setup) -> nn.Module:
    """Build Detectron2's own trunk and neck with the weights of ours, for inference."""
    backbone: Any = modeling.build_backbone(detectron2_cfg("detectron2-cascade", setup))
    own = "backbone."
    backbone.load_state_dict(
        {name.removeprefix(own): x for name, x in setup.weights.items() if name.startswith(own)}
    )
    return cast(nn.Module, backbone.to(setup.device).eval())


def detectron2_cfg(kind: str, setup: Setup, *more: Any) -> Any:
    """The configuration of a Detectron2 model.

    Args:
        kind: as for ``build_detectron2``.
        setup: what all models share.
        more: keys and values that override the configuration.
    """
    options = setup.options
    return host.load_config(
        list(options.config_file),
        [*options.opts, "MODEL.DEVICE", setup.cfg.MODEL.DEVICE, *_OPTIONS[kind], *more],
    )


def load(model: nn.Module, weights: dict[str, Tensor], seed: int) -> None:
    """Load the weights of our cascade into a Detectron2 model, cascade or single stage.

    Args:
        model: gets the weights.
        weights: state dict of our detector.
        seed: of the single-stage predictor, whose shapes differ.

    Raises:
        ConfigError: a cascade lacks a parameter of ours.
    """
    state = model.state_dict()
    is_cascade = any(name.startswith("roi_heads.box_head.0.") for name in state)
    if not is_cascade:
        for part in ("box_head", "box_predictor"):
            stage0, single = f"roi_heads.{part}.0.", f"roi_heads.{part}."
            weights = {name.replace(stage0, single): x for name, x in weights.items()}
        predictor: Any = model.roi_heads.box_predictor  # type: ignore[union-attr]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            draw_predictor(predictor.cls_score, predictor.bbox_pred)
    fitting = {k: v for k, v in weights.items() if k in state and v.shape == state[k].shape}
    unused = [name for name in weights if name not in fitting and ".exits." not in name]
    if is_cascade and unused:
        raise ConfigError(f"Detectron2 builds another cascade: it has no parameter {unused[0]}")
    model.load_state_dict(fitting, strict=False)


def open_training_step(
    setup: Setup, batch: Sequence[Sample], options: Sequence[Any] = ()
) -> tuple[Callable[[], None], list[PartStart]]:
    """What takes one step of Detectron2's ``SimpleTrainer``, as shipped, and starts of its parts.

    Args:
        setup: what all models share.
        batch: with ``gt_boxes`` and ``gt_classes``.
        options: keys and values that override the configuration.
    """
    cfg = detectron2_cfg("detectron2-cascade", setup, *options)
    model: Any = build_model(cfg).train()
    load(model, setup.weights, setup.options.seed)
    setup.place(model)
    inputs = [_with_instances(sample) for sample in batch]
    optimizer = build_optimizer(cfg, model)
    trainer = SimpleTrainer(model, itertools.repeat(inputs), optimizer)
    storage = EventStorage()

    def step() -> None:
        with storage:
            trainer.iter = storage.iter
            trainer.run_step()
            storage.step()

    return step, [
        (model, "preprocess_image", "preprocess"),
        (model.backbone, "forward", "backbone"),
        (model.proposal_generator, "forward", "rpn"),
        (model.roi_heads, "forward", "heads"),
        (Tensor, "backward", "backward"),
        (SimpleTrainer, "_write_metrics", "metrics"),
        (optimizer, "step", "optimizer"),
    ]


def _with_instances(sample: Sample) -> Sample:
    objects = Instances(
        tuple(sample["image"].shape[-2:]),
        gt_boxes=Boxes(sample["gt_boxes"].clone()),
        gt_classes=sample["gt_classes"].clone(),
    )
    return {**sample, "instances": objects}
