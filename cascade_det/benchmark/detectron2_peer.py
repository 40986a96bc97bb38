"""The real Detectron2, with its own heads and with ours in them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import cascade_rcnn
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from cascade_det.benchmark.contenders import Outcome
from cascade_det.benchmark.marks import Mark, Marks
from cascade_det.benchmark.setup import Regions, Sample, Setup
from cascade_det.benchmark.weights import spread
from cascade_det.core import ExitPolicy, PartTimer
from cascade_det.d2 import host
from cascade_det.d2.detector import Detector
from cascade_det.d2.roi_heads import EarlyExitCascadeROIHeads
from cascade_det.d2.structures import to_detections
from cascade_det.errors import ConfigError

# The heads of each kind, and what else Detectron2's own configurations of such a model have.
_OPTIONS: dict[str, tuple[Any, ...]] = {
    "plugin": (
        *("MODEL.ROI_HEADS.NAME", "EarlyExitCascadeROIHeads"),
        *("MODEL.CASCADE.FAST.ENABLED", False),
    ),
    "plugin-fast": (
        *("MODEL.ROI_HEADS.NAME", "EarlyExitCascadeROIHeads"),
        *("MODEL.CASCADE.FAST.ENABLED", True),
    ),
    "detectron2-cascade": ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads"),
    "detectron2-one-stage": (
        *("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
        *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", False),
    ),
}


class SharedMaps:
    """Feature maps of batches, which models with the same backbone compute once.

    Args:
        most: batches whose maps are kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: list[tuple[Sequence[Sample], tuple[Any, dict[str, Tensor]]]] = []

    def of(self, model: Any, batch: Sequence[Sample]) -> tuple[Any, dict[str, Tensor]]:
        """Images as the model takes them, and maps by name."""
        for known, entered in self._known:
            if known is batch:
                return entered
        images = model.preprocess_image(batch)
        entered = images, model.backbone(images.tensor)
        self._known = [*self._known, (batch, entered)][-self._most :]
        return entered


class InDetectron2:
    """A model of Detectron2, whatever its heads.

    Args:
        model: in evaluation mode.
        maps: shared with the other models.
    """

    def __init__(self, model: Any, maps: SharedMaps) -> None:
        self.model = model
        self.heads_are_ours = isinstance(self.model.roi_heads, EarlyExitCascadeROIHeads)
        self._maps = maps
        self._arrived = 0
        self.model.roi_heads.register_forward_pre_hook(self._count)

    def limit_proposals(self, count: int) -> None:
        """Let the RPN hand out so many regions of an image."""
        self.model.proposal_generator.post_nms_topk[False] = count

    def set_exits(self, exits: ExitPolicy | None) -> None:
        """Let regions leave by these, where the heads are ours."""
        if self.heads_are_ours:
            self.model.roi_heads.exits = exits

    def inputs(self, batch: Sequence[Sample]) -> Sequence[Sample]:
        """The batch as the model takes it."""
        return batch

    def prepare(
        self, batch: Sequence[Sample], regions: Regions, dtype: torch.dtype | None
    ) -> tuple[Any, dict[str, Tensor], list[Instances]]:
        """Its own features, with given regions."""
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
        """The RoI heads alone."""
        return self.model.roi_heads(*prepared, None)[0]

    def whole(self, batch: Sequence[Sample]) -> list[Instances]:
        """The whole model."""
        return [output["instances"] for output in self.model(batch)]

    def outcome(self, returned: list[Instances]) -> Outcome:
        """What a call returned, in our terms."""
        heads = self.model.roi_heads
        stages = getattr(heads, "num_cascade_stages", 1)
        entered = heads.stats.entered if self.heads_are_ours else [self._arrived] * stages
        return Outcome([to_detections(found) for found in returned], self._arrived, entered)

    def parts(self, batch: Sequence[Sample]) -> dict[str, float]:
        """Milliseconds of the parts of one call."""
        device = self.model.device
        if self.heads_are_ours:
            timer = PartTimer(device)
            Detector(self.model).detect(batch, timer=timer)
            return timer.milliseconds
        marks = Marks(device)
        with marks.watching(self._marks()):
            self.model(batch)
        return marks.milliseconds

    def _marks(self) -> list[Mark]:
        model, heads = self.model, self.model.roi_heads
        before: list[Mark] = [
            (model, "preprocess_image", "preprocess"),
            (model.backbone, "forward", "backbone"),
            (model.proposal_generator, "forward", "rpn"),
        ]
        if hasattr(heads, "num_cascade_stages"):
            return [
                *before,
                (heads, "_run_stage", lambda features, proposals, stage: f"stage{stage}"),
                (cascade_rcnn, "fast_rcnn_inference", "postprocess"),
            ]
        return [
            *before,
            (heads, "_forward_box", "stage0"),
            (heads.box_predictor, "inference", "postprocess"),
        ]

    def _count(self, heads: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._arrived = sum(len(proposals) for proposals in inputs[2])


def build_detectron2(kind: str, setup: Setup, maps: SharedMaps) -> InDetectron2:
    """A model of Detectron2 with the weights of all contenders.

    A single-stage head gets those of stage 0; where its shapes are others, it has drawn ones.

    Args:
        kind: "plugin", "plugin-fast", "detectron2-cascade" or "detectron2-one-stage".
        setup: what the contenders share.
        maps: likewise.
    """
    model: Any = build_model(detectron2_cfg(kind, setup)).eval()
    load(model, setup.weights, setup.options.seed)
    return InDetectron2(model, maps)


def detectron2_cfg(kind: str, setup: Setup, *more: Any) -> Any:
    """The configuration of a model of Detectron2; arguments as of ``build_detectron2``."""
    options = setup.options
    return host.load_config(
        list(options.config_file),
        # The weights are set from the state dict that all contenders have.
        [*options.opts, "MODEL.DEVICE", str(setup.device), *_OPTIONS[kind], *more],
    )


def load(model: nn.Module, weights: dict[str, Tensor], seed: int) -> None:
    """Set the weights of a model of Detectron2, of a single-stage one too.

    Raises:
        ConfigError: it has no place for some, so that it is another cascade.
    """
    state = model.state_dict()
    is_cascade = any(name.startswith("roi_heads.box_head.0.") for name in state)
    if not is_cascade:
        first = {"box_head.0.": "box_head.", "box_predictor.0.": "box_predictor."}
        for prefix, single in first.items():
            weights = {
                k.replace(f"roi_heads.{prefix}", f"roi_heads.{single}"): v
                for k, v in weights.items()
            }
        predictor: Any = model.roi_heads.box_predictor  # type: ignore[union-attr]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            spread(predictor.cls_score, predictor.bbox_pred)
    fitting = {k: v for k, v in weights.items() if k in state and v.shape == state[k].shape}
    left = [name for name in weights if name not in fitting and ".exits." not in name]
    if is_cascade and left:
        raise ConfigError(f"Detectron2 builds another cascade: it has no place for {left[0]}")
    model.load_state_dict(fitting, strict=False)


def open_training_step(
    setup: Setup, batch: Sequence[Sample], options: Sequence[Any] = ()
) -> Callable[[], None]:
    """What takes one step of Detectron2's ``SimpleTrainer`` on a batch, as shipped.

    Args:
        setup: what the contenders share.
        batch: with ``gt_boxes`` and ``gt_classes``.
        options: keys and values on top of the configuration.
    """
    kind = "detectron2-cascade"
    cfg = detectron2_cfg(kind, setup, *options)
    model: Any = build_model(cfg).train()
    load(model, setup.weights, setup.options.seed)
    inputs = [_with_instances(sample) for sample in batch]
    trainer = SimpleTrainer(model, itertools.repeat(inputs), build_optimizer(cfg, model))
    storage = EventStorage()

    def step() -> None:
        with storage:
            trainer.iter = storage.iter
            trainer.run_step()
            storage.step()

    return step


def _with_instances(sample: Sample) -> Sample:
    objects = Instances(
        tuple(sample["image"].shape[-2:]),
        gt_boxes=Boxes(sample["gt_boxes"].clone()),
        gt_classes=sample["gt_classes"].clone(),
    )
    return {**sample, "instances": objects}
