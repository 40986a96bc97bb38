"""The models of a comparison, by name, behind one set of methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from cascade_det.benchmark.setup import Regions, Setup
from cascade_det.core import (
    CascadeHead,
    CascadeInputs,
    CascadeStats,
    Detections,
    ExitPolicy,
    MaskRules,
    PartTimer,
)
from cascade_det.core.roi_pooling import Pyramid
from cascade_det.data.samples import Sample
from cascade_det.engine.devices import has_bfloat16
from cascade_det.standalone import Detector
from cascade_det.standalone.optimize import optimize


@dataclass
class ModelOutput:
    """The result of one call.

    Attributes:
        detections: per image, XYXY pixels of the input images.
        arrived: regions of the batch that the RPN proposed, or that were given.
        entered: regions of the batch that each stage computed.
        tiles: of the finest map: all of the batch, those open for the RPN, and those computed; 0
            without a tile gate.
    """

    detections: list[Detections]
    arrived: int
    entered: list[int]
    tiles: tuple[int, int, int] = (0, 0, 0)


class ModelAdapter(Protocol):
    """A detector in evaluation mode, behind the methods that measurements call."""

    def inputs(self, batch: Sequence[Sample]) -> Any:
        """A batch in the form that ``whole`` and ``parts`` take."""
        return batch

    def set_exits(self, exits: ExitPolicy | None) -> None:
        """Use these exits if the heads have any."""

    def limit_proposals(self, count: int) -> None:
        """Let the RPN return at most ``count`` regions per image."""

    def prepare(self, batch: Sequence[Sample], regions: Regions, dtype: torch.dtype | None) -> Any:
        """The input of ``heads``: the model's own features of a batch, with given regions.

        ``dtype`` is that of the features under autocast, else ``None``.
        """

    def heads(self, prepared: Any) -> Any:
        """Run the RoI heads alone."""

    def prepare_masks(
        self, batch: Sequence[Sample], given: Sequence[Detections], dtype: torch.dtype | None
    ) -> Any:
        """The input of ``masks``: features as box heads leave them, with given detections.

        ``dtype`` as in ``prepare``.
        """

    def masks(self, prepared: Any) -> list[Tensor]:
        """Pool the detections and run the mask head alone: per image ``[D, M, M]``."""

    def whole(self, inputs: Any) -> Any:
        """Run the whole model."""

    def output(self, returned: Any) -> ModelOutput:
        """Convert what the last call of ``heads`` or ``whole`` returned."""

    def parts(self, inputs: Any, timer: PartTimer) -> None:
        """Run the whole model; the timer gets the milliseconds of its parts."""


@dataclass
class BenchmarkModel:
    """A model in one of its settings.

    Attributes:
        adapter: may be shared with models in other settings.
        device: of the model.
        keeps_memory: whether the process keeps freed memory while it runs, which ``optimize`` and
            our heads in Detectron2 set for all models.
        exits: ``None`` for no exits.
        autocast: dtype under autocast; ``None`` for no autocast.
    """

    adapter: ModelAdapter
    device: torch.device
    keeps_memory: bool = False
    exits: ExitPolicy | None = None
    autocast: torch.dtype | None = None

    def run(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call a method of the adapter with this model's exits and autocast."""
        self.adapter.set_exits(self.exits)
        enabled = self.autocast is not None
        with torch.no_grad(), torch.autocast(self.device.type, self.autocast, enabled=enabled):
            return call(*arguments)

    def parts(self, inputs: Any) -> dict[str, float]:
        """Run the whole model once; milliseconds by part."""
        timer = PartTimer(self.device)
        self.run(self.adapter.parts, inputs, timer)
        return timer.milliseconds


class Standalone(ModelAdapter):
    """Our detector without Detectron2."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector

    def limit_proposals(self, count: int) -> None:
        """Let the RPN return at most ``count`` regions per image."""
        rpn = self.detector.proposal_generator
        rpn.post_nms_topk = (rpn.post_nms_topk[0], count)

    def set_exits(self, exits: ExitPolicy | None) -> None:
        """Use these exits."""
        self.detector.set_exits(exits)

    def prepare(
        self, batch: Sequence[Sample], regions: Regions, dtype: torch.dtype | None
    ) -> CascadeInputs:
        """The model's own features, with given regions."""
        inputs = self.detector.cascade_inputs(batch)
        return replace(inputs, proposals=regions.boxes, objectness=regions.objectness)

    def heads(self, prepared: CascadeInputs) -> Any:
        """Run the RoI heads alone."""
        return self.detector.cascade.detect(**vars(prepared))

    def prepare_masks(
        self, batch: Sequence[Sample], given: Sequence[Detections], dtype: torch.dtype | None
    ) -> tuple[CascadeHead, Sequence[Detections], Pyramid]:
        """The model's own features in the layout of the pooling, with given detections."""
        cascade = self.detector.cascade
        return cascade, given, cascade.pyramid(self.detector.cascade_inputs(batch).features)

    def masks(self, prepared: tuple[CascadeHead, Sequence[Detections], Pyramid]) -> list[Tensor]:
        """Pool the detections and run the mask head alone."""
        return make_masks(*prepared)

    def whole(self, inputs: Sequence[Sample]) -> Any:
        """Run the whole model."""
        output = self.detector.detect(inputs)
        return output.detections, output.stats

    def output(self, returned: Any) -> ModelOutput:
        """Convert the detections and stats of a call."""
        detections, stats = returned
        return ModelOutput(detections, stats.proposed, stats.entered, tiles_of(stats))

    def parts(self, inputs: Sequence[Sample], timer: PartTimer) -> None:
        """Run the whole model; the timer gets the milliseconds of its parts."""
        self.detector.detect(inputs, timer=timer)


def tiles_of(stats: CascadeStats) -> tuple[int, int, int]:
    """The tiles of ``ModelOutput``."""
    return stats.tiles, stats.tiles_open, stats.tiles_computed


def make_masks(cascade: CascadeHead, given: Sequence[Detections], pyramid: Pyramid) -> list[Tensor]:
    """Masks of all given detections, whatever the rules: per image ``[D, M, M]``."""
    assert cascade.masks is not None
    made, _ = replace(cascade.masks, rules=MaskRules()).add(given, pyramid)
    return [found.masks for found in made if found.masks is not None]


class SharedMaps:
    """Feature maps of batches, computed once for all models with the same backbone.

    Args:
        most: number of batches to keep.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: list[tuple[Sequence[Sample], tuple[Any, dict[str, Tensor]]]] = []

    def of(self, model: Any, batch: Sequence[Sample]) -> tuple[Any, dict[str, Tensor]]:
        """Images as the model takes them, and feature maps by name."""
        for known, entry in self._known:
            if known is batch:
                return entry
        images = model.preprocess_image(batch)
        entry = images, model.backbone(images.tensor)
        self._known = [*self._known, (batch, entry)][-self._most :]
        return entry


def open_models(
    setup: Setup, names: Sequence[str]
) -> tuple[dict[str, BenchmarkModel], dict[str, str]]:
    """Build the models that run here; models in several settings are built once.

    Args:
        setup: what all models share.
        names: from ``options.MODELS``.

    Returns:
        The models, and the reasons why the others cannot run, both by name.
    """
    adapters: dict[str, ModelAdapter] = {}
    maps = SharedMaps(setup.options.images)
    opened: dict[str, BenchmarkModel] = {}
    left_out: dict[str, str] = {}
    for name in names:
        if reason := _why_not(name, setup):
            left_out[name] = reason
            continue
        kind = name.removesuffix("-exits").removesuffix("-autocast")
        try:
            if kind not in adapters:
                adapters[kind] = _build(kind, setup, maps)
        except Exception as error:  # Detectron2 asserts what it supports
            if name.startswith("ours"):
                raise
            left_out[name] = f"cannot be built for this configuration: {error or repr(error)}"
            continue
        opened[name] = BenchmarkModel(
            adapters[kind],
            setup.device,
            keeps_memory=setup.device.type == "cpu" and "-fast" in name,
            exits=setup.exits[0] if name.endswith("-exits") else None,
            autocast=getattr(torch, setup.options.autocast) if name.endswith("-autocast") else None,
        )
    return opened, left_out


def _why_not(name: str, setup: Setup) -> str:
    """Why a model cannot run; empty if it can."""
    if name.endswith("-exits") and setup.exits[0] is None:
        return setup.exits[1]
    skips_emulated = not setup.options.emulated and not has_bfloat16(setup.device)
    if name.endswith("-autocast") and skips_emulated:
        return "this CPU has no instructions for bfloat16 and would only emulate it"
    if name.startswith(("plugin", "detectron2")):
        return why_no_detectron2()
    model = setup.cfg.MODEL
    trunk = model.BACKBONE.NAME, model.RESNETS.DEPTH
    if name == "torchvision" and trunk != ("build_resnet_fpn_backbone", 50):
        return "its backbone is ResNet-50 with a feature pyramid, the configuration has another one"
    return ""


def _build(kind: str, setup: Setup, maps: SharedMaps) -> ModelAdapter:
    if kind == "ours":
        return Standalone(setup.build_ours())
    if kind == "ours-fast":
        images = setup.fast_images
        return Standalone(optimize(setup.build_ours(), **setup.fast_arguments(), images=images))
    if kind == "torchvision":
        from cascade_det.benchmark.torchvision_peer import build_torchvision

        return build_torchvision(setup)
    from cascade_det.benchmark.detectron2_peer import build_detectron2

    return build_detectron2(kind, setup, maps)


def why_no_detectron2() -> str:
    """Why models in Detectron2 cannot run; empty if they can."""
    try:
        import cascade_det.d2.host  # noqa: F401
    # Incompatible versions raise more than ImportError.
    except Exception as error:
        return f"Detectron2 cannot be imported ({type(error).__name__}: {error})"
    return ""
