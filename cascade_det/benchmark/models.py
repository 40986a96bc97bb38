"""The models of a comparison, by name, behind one set of methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cascade_det.benchmark.setup import Regions, Setup
from cascade_det.core import CascadeInputs, Detections, ExitPolicy, PartTimer
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
    """

    detections: list[Detections]
    arrived: int
    entered: list[int]


class ModelAdapter(ABC):
    """A detector in evaluation mode, behind the methods that measurements call."""

    def inputs(self, batch: Sequence[Sample]) -> Any:
        """A batch in the form that ``whole`` and ``parts`` take."""
        return batch

    @abstractmethod
    def set_exits(self, exits: ExitPolicy | None) -> None:
        """Use these exits if the heads have any."""

    @abstractmethod
    def limit_proposals(self, count: int) -> None:
        """Let the RPN return at most ``count`` regions per image."""

    @abstractmethod
    def prepare(self, batch: Sequence[Sample], regions: Regions, dtype: torch.dtype | None) -> Any:
        """The input of ``heads``: the model's own features of a batch, with given regions.

        ``dtype`` is that of the features under autocast, else ``None``.
        """

    @abstractmethod
    def heads(self, prepared: Any) -> Any:
        """Run the RoI heads alone."""

    @abstractmethod
    def whole(self, inputs: Any) -> Any:
        """Run the whole model."""

    @abstractmethod
    def output(self, returned: Any) -> ModelOutput:
        """Convert what the last call of ``heads`` or ``whole`` returned."""

    @abstractmethod
    def parts(self, inputs: Any) -> dict[str, float]:
        """Run the whole model once; milliseconds by part."""


class BenchmarkModel:
    """A model in one of its settings.

    Args:
        name: one of ``options.MODELS``.
        adapter: may be shared with models in other settings.
        device: of the model.
        exits: ``None`` for no exits.
        autocast: dtype under autocast; ``None`` for no autocast.
    """

    def __init__(
        self,
        name: str,
        adapter: ModelAdapter,
        device: torch.device,
        *,
        exits: ExitPolicy | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.adapter = adapter
        self.exits = exits
        self.autocast = autocast
        # ``optimize`` and our heads in Detectron2 set this for the whole process.
        self.keeps_memory = device.type == "cpu" and "-fast" in name
        self._device = device

    @torch.no_grad()
    def prepare(self, batch: Sequence[Sample], regions: Regions) -> Any:
        """The input of ``heads``, see ``ModelAdapter.prepare``."""
        return self.adapter.prepare(batch, regions, self.autocast)

    def heads(self, prepared: Any) -> Any:
        """Run the RoI heads alone."""
        with self._setting():
            return self.adapter.heads(prepared)

    def whole(self, inputs: Any) -> Any:
        """Run the whole model."""
        with self._setting():
            return self.adapter.whole(inputs)

    def parts(self, inputs: Any) -> dict[str, float]:
        """Run the whole model once; milliseconds by part."""
        with self._setting():
            return self.adapter.parts(inputs)

    @contextmanager
    def _setting(self) -> Iterator[None]:
        self.adapter.set_exits(self.exits)
        enabled = self.autocast is not None
        autocast = torch.autocast(self._device.type, self.autocast, enabled=enabled)
        with torch.no_grad(), autocast:
            yield


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

    def whole(self, inputs: Sequence[Sample]) -> Any:
        """Run the whole model."""
        output = self.detector.detect(inputs)
        return output.detections, output.stats

    def output(self, returned: Any) -> ModelOutput:
        """Convert the detections and stats of a call."""
        detections, stats = returned
        return ModelOutput(detections, stats.proposed, stats.entered)

    def parts(self, inputs: Sequence[Sample]) -> dict[str, float]:
        """Run the whole model once; milliseconds by part."""
        timer = PartTimer(self.detector.device)
        self.detector.detect(inputs, timer=timer)
        return timer.milliseconds


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
            name,
            adapters[kind],
            setup.device,
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
    if name == "torchvision":
        from cascade_det.benchmark.torchvision_peer import reason_against

        return reason_against(setup.cfg)
    return ""


def _build(kind: str, setup: Setup, maps: SharedMaps) -> ModelAdapter:
    if kind == "ours":
        return Standalone(setup.build_ours())
    if kind == "ours-fast":
        return Standalone(optimize(setup.build_ours(), **setup.fast_arguments()))
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
