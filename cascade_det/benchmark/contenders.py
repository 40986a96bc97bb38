"""The detectors that are compared, by name, with one set of methods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from cascade_det.benchmark.setup import Regions, Sample, Setup
from cascade_det.core import CascadeInputs, Detections, ExitPolicy, PartTimer
from cascade_det.engine.devices import has_bfloat16
from cascade_det.standalone import Detector
from cascade_det.standalone.optimize import optimize


@dataclass
class Outcome:
    """What one call gave.

    Attributes:
        detections: per image, XYXY pixels of the images that were handed in.
        arrived: regions of the batch that came out of the RPN, or were given.
        entered: regions of the batch that each stage computed.
    """

    detections: list[Detections]
    arrived: int
    entered: list[int]


class Model(Protocol):
    """A detector of some host, in evaluation mode."""

    def limit_proposals(self, count: int) -> None:
        """Let the RPN hand out this many regions of an image at most."""

    def set_exits(self, exits: ExitPolicy | None) -> None:
        """Let regions leave by these exits, where heads have any."""

    def prepare(self, batch: Sequence[Sample], regions: Regions, dtype: torch.dtype | None) -> Any:
        """What ``heads`` takes: the model's own features of a batch, with given regions.

        ``dtype`` is that of the features under autocast, else ``None``.
        """

    def heads(self, prepared: Any) -> Any:
        """The RoI heads alone; what they return."""

    def whole(self, batch: Any) -> Any:
        """The whole model, on what ``inputs`` gives; what it returns."""

    def inputs(self, batch: Sequence[Sample]) -> Any:
        """A batch as the model takes it."""

    def outcome(self, returned: Any) -> Outcome:
        """What the last call of ``heads`` or ``whole`` returned, in our terms."""

    def parts(self, batch: Any) -> dict[str, float]:
        """Milliseconds of the parts of one call of ``whole``."""


class Contender:
    """A model in one of its settings.

    Args:
        name: one of ``options.CONTENDERS``.
        model: may be that of other contenders too.
        device: of the model.
        exits: that it runs with.
        autocast: type that it runs under autocast with; ``None`` for none.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        device: torch.device,
        *,
        exits: ExitPolicy | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.name = name
        self.model = model
        self.exits = exits
        self.autocast = autocast
        # As ``optimize`` and our heads in Detectron2 have it, for the whole process.
        self.keeps_memory = device.type == "cpu" and "-fast" in name
        self._device = device

    def limit_proposals(self, count: int) -> None:
        """Let the RPN hand out this many regions of an image at most."""
        self.model.limit_proposals(count)

    @torch.no_grad()
    def prepare(self, batch: Sequence[Sample], regions: Regions) -> Any:
        """What ``heads`` takes, see ``Model.prepare``."""
        return self.model.prepare(batch, regions, self.autocast)

    def heads(self, prepared: Any) -> Any:
        """Run the RoI heads alone."""
        with self._setting():
            return self.model.heads(prepared)

    def inputs(self, batch: Sequence[Sample]) -> Any:
        """A batch as ``whole`` takes it."""
        return self.model.inputs(batch)

    def whole(self, inputs: Any) -> Any:
        """Run the whole model."""
        with self._setting():
            return self.model.whole(inputs)

    def outcome(self, returned: Any) -> Outcome:
        """What the last call returned, in our terms."""
        return self.model.outcome(returned)

    def parts(self, inputs: Any) -> dict[str, float]:
        """Milliseconds of the parts of one run of the whole model."""
        with self._setting():
            return self.model.parts(inputs)

    @contextmanager
    def _setting(self) -> Iterator[None]:
        self.model.set_exits(self.exits)
        autocast = (
            nullcontext()
            if self.autocast is None
            else torch.autocast(self._device.type, self.autocast)
        )
        with torch.no_grad(), autocast:
            yield


class Standalone:
    """Our detector without Detectron2."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector

    def limit_proposals(self, count: int) -> None:
        """Let the RPN hand out so many regions of an image."""
        rpn = self.detector.proposal_generator
        rpn.post_nms_topk = (rpn.post_nms_topk[0], count)

    def set_exits(self, exits: ExitPolicy | None) -> None:
        """Let regions leave by these."""
        self.detector.set_exits(exits)

    def inputs(self, batch: Sequence[Sample]) -> Sequence[Sample]:
        """The batch as the model takes it."""
        return batch

    def prepare(
        self, batch: Sequence[Sample], regions: Regions, dtype: torch.dtype | None
    ) -> CascadeInputs:
        """Its own features, with given regions."""
        inputs = self.detector.cascade_inputs(batch)
        return replace(inputs, proposals=regions.boxes, objectness=regions.objectness)

    def heads(self, prepared: CascadeInputs) -> Any:
        """The RoI heads alone."""
        return self.detector.cascade.detect(**vars(prepared))

    def whole(self, batch: Sequence[Sample]) -> Any:
        """The whole model."""
        output = self.detector.detect(batch)
        return output.detections, output.stats

    def outcome(self, returned: Any) -> Outcome:
        """What a call returned, in our terms."""
        detections, stats = returned
        return Outcome(detections, stats.proposed, stats.entered)

    def parts(self, batch: Sequence[Sample]) -> dict[str, float]:
        """Milliseconds of the parts of one call."""
        timer = PartTimer(self.detector.device)
        self.detector.detect(batch, timer=timer)
        return timer.milliseconds


def open_contenders(
    setup: Setup, names: Sequence[str]
) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders that can run here, and why the others cannot, both by name.

    Args:
        setup: what they share.
        names: out of ``options.CONTENDERS``.
    """
    models = _Models(setup)
    opened: dict[str, Contender] = {}
    left_out: dict[str, str] = {}
    for name in names:
        reason = models.reason_against(name)
        if reason:
            left_out[name] = reason
            continue
        try:
            model = models.of(name)
        except Exception as error:  # Detectron2 tells by assertions what it cannot build
            if name.startswith("ours"):
                raise
            left_out[name] = f"cannot be built for this configuration: {error or repr(error)}"
            continue
        opened[name] = Contender(
            name,
            model,
            setup.device,
            exits=setup.exits[0] if name.endswith("-exits") else None,
            autocast=getattr(torch, setup.options.autocast) if name.endswith("-autocast") else None,
        )
    return opened, left_out


class _Models:
    """Each model once, however many contenders it is."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._built: dict[str, Model] = {}
        self._maps: Any = None
        self._skips_autocast = not setup.options.emulated and not has_bfloat16(setup.device)

    def reason_against(self, name: str) -> str:
        """Why a contender cannot run; empty if it can."""
        if name.endswith("-exits") and self._setup.exits[0] is None:
            return self._setup.exits[1]
        if name.endswith("-autocast") and self._skips_autocast:
            return "this CPU has no instructions for bfloat16 and would only emulate it"
        if name.startswith(("plugin", "detectron2")):
            return why_no_detectron2()
        if name == "torchvision":
            from cascade_det.benchmark.torchvision_peer import reason_against

            return reason_against(self._setup.cfg)
        return ""

    def of(self, name: str) -> Model:
        """The model of a contender."""
        kind = name.removesuffix("-exits").removesuffix("-autocast")
        if kind not in self._built:
            self._built[kind] = self._build(kind)
        return self._built[kind]

    def _build(self, kind: str) -> Model:
        if kind == "ours":
            return Standalone(self._setup.build_ours())
        if kind == "ours-fast":
            return Standalone(optimize(self._setup.build_ours(), **self._setup.fast_arguments()))
        if kind == "torchvision":
            from cascade_det.benchmark.torchvision_peer import build_torchvision

            return build_torchvision(self._setup)
        from cascade_det.benchmark.detectron2_peer import SharedMaps, build_detectron2

        self._maps = self._maps or SharedMaps(self._setup.options.images)
        return build_detectron2(kind, self._setup, self._maps)


def why_no_detectron2() -> str:
    """Why the contenders that live in Detectron2 cannot run; empty if they can."""
    try:
        import cascade_det.d2.host  # noqa: F401
    # Not ImportError alone: versions that do not fit each other fail in many ways.
    except Exception as error:
        return f"Detectron2 cannot be imported ({type(error).__name__}: {error})"
    return ""
