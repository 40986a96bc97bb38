"""Layers of a detector in 8 bits; the grids of their maps are measured on images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cascade_det.backbones.int8_resnet import int8_stages
from cascade_det.core import Detections
from cascade_det.data.samples import Batch
from cascade_det.engine.detector import CascadeDetector
from cascade_det.engine.fast_types import describe_agreement, detect_all
from cascade_det.engine.optimization import Part
from cascade_det.engine.part_types import PartTypes
from cascade_det.evaluation.agreement import find_again
from cascade_det.layers.folding import is_fixed
from cascade_det.layers.int8 import Grid, Int8Conv2d

# Share of the values beyond either end of a grid; they are clipped.
_BEYOND = 1e-5
# Values of a map that are kept, over all images: all of them would fill the memory.
_SAMPLES = 2**18


class Ranges:
    """Grids of what layers read and return when a detector detects in images in float32.

    Measured once and known by the names of the layers, so that they serve copies of the detector.

    Args:
        images: batches.

    Attributes:
        detections: in the images.
    """

    def __init__(self, images: Sequence[Batch]) -> None:
        self.images = images
        self.detections: list[Detections] = []
        self._read: dict[str, list[Tensor]] = {}
        self._returned: dict[str, list[Tensor]] = {}
        self._names: dict[nn.Module, str] = {}

    def of(self, detector: CascadeDetector) -> Ranges:
        """Measure, if that is to be done yet, and give the grids of this detector's layers."""
        self._names = {module: name for name, module in detector.named_modules()}
        if not self._read:
            # Layers, and residual blocks.
            watched = [
                module
                for module in self._names
                if isinstance(module, nn.Conv2d | nn.Linear) or hasattr(module, "conv1")
            ]
            hooks = [module.register_forward_hook(self._keep) for module in watched]
            exits = detector.cascade.exits
            detector.set_exits(None)  # so that regions reach the heads of all stages
            try:
                self.detections = detect_all(detector, self.images)
            finally:
                detector.set_exits(exits)
                for hook in hooks:
                    hook.remove()
            if exits is not None:
                self.detections = detect_all(detector, self.images)
        return self

    def of_input(self, layer: nn.Module) -> Grid:
        """The grid of what a layer reads."""
        return _grid(self._read.get(self._names[layer], []))

    def of_output(self, layer: nn.Module, relu: bool) -> Grid:
        """The grid of what a layer returns, or of the ReLU of that."""
        returned = self._returned.get(self._names[layer], [])
        return _grid([x.relu() for x in returned] if relu else returned)

    def compare(self, detector: CascadeDetector) -> str:
        """Compare what an optimised detector detects in the images with float32, and say so."""
        agreement = find_again(detect_all(detector, self.images), self.detections)
        return f"On the images that measured its ranges it {describe_agreement(agreement)}."

    def _keep(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        for kept, x in ((self._read, inputs[:1]), (self._returned, (output,))):
            if x and isinstance(x[0], Tensor) and x[0].numel() and x[0].is_floating_point():
                samples = kept.setdefault(self._names[layer], [])
                samples.append(_sample(x[0], _SAMPLES // len(self.images), seed=len(samples)))


def _sample(x: Tensor, count: int, *, seed: int) -> Tensor:
    # In the order of memory, so that a channels-last map is not copied.
    flat = x.permute(0, 2, 3, 1).reshape(-1) if x.dim() == 4 else x.reshape(-1)
    generator = torch.Generator().manual_seed(seed)
    return flat[torch.randint(len(flat), (count,), generator=generator)]


def _grid(samples: list[Tensor]) -> Grid:
    # Of a layer that no region reaches, even without exits.
    values = torch.cat(samples or [torch.zeros(1)])
    beyond = int(_BEYOND * len(values))
    low, high = (values.kthvalue(k).values.item() for k in (1 + beyond, len(values) - beyond))
    return Grid.of_range(low, high)


def int8_parts(
    parts: Mapping[str, Part], heads: Iterable[nn.Module], blocks: tuple[type[nn.Module], ...]
) -> set[str]:
    """The parts that can compute in 8 bits, of ``INT8_PARTS``.

    Args:
        parts: of the detector before the heads, in evaluation mode.
        heads: the box heads.
        blocks: the classes of residual blocks.
    """
    found = {name for name in ("fpn", "rpn") if name in parts and _convs(parts[name])}
    stages = parts["backbone"].modules if "backbone" in parts else []
    in_stages = [block for stage in stages for block in stage.children()]
    if in_stages and all(isinstance(block, blocks) and _is_plain(block) for block in in_stages):
        found.add("backbone")
    if all(_first_linear(head) is not None for head in heads):
        found.add("roi_heads")
    return found


class Int8:
    """The parts of a detector that shall compute in 8 bits.

    Args:
        detector: in float32 and evaluation mode, with heads that are not optimised yet.
        types: of its parts; where none is in 8 bits, nothing is done.
        ranges: of the detector or one of its copies.

    Attributes:
        head_grids: of the crops that the box heads read; empty if these are not in 8 bits.
    """

    def __init__(self, detector: CascadeDetector, types: PartTypes, ranges: Ranges) -> None:
        self.types = types
        self.head_grids: list[Grid] = []
        if types.int8:
            self.ranges = ranges.of(detector)
        if "roi_heads" in types.int8:
            linears = map(_first_linear, detector.cascade.box_head)
            self.head_grids = [ranges.of_input(linear) for linear in linears if linear is not None]

    def replace(self, model: nn.Module, parts: Mapping[str, Part]) -> list[str]:
        """Replace the layers before the heads, and say so.

        Args:
            model: holds all parts.
            parts: with folded norms, in float32.
        """
        new: dict[nn.Module, nn.Module] = {}
        if "backbone" in self.types.int8:
            stages = parts["backbone"].modules
            inputs = self.ranges.of_input(next(stages[0].children()))
            new.update(int8_stages(stages, inputs, self.ranges.of_output))
        blocks = len(new)
        for name in self.types.int8 & {"fpn", "rpn"}:
            for conv in _convs(parts[name]):
                inputs, output = self.ranges.of_input(conv), self.types.floating[name]
                new[conv] = Int8Conv2d(conv, inputs, output=output)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if child in new:
                    setattr(parent, name, new[child])
        if not new:
            return []
        return [f"{blocks} residual blocks and {len(new) - blocks} convolutions are in 8 bits."]


def _convs(part: Part) -> list[nn.Conv2d]:
    """The convolutions of a part whose norms, if any, are folded or will be."""
    return [m for m in part.modules if isinstance(m, nn.Conv2d) and _is_plain(m)]


def _is_plain(module: nn.Module) -> bool:
    """Whether a module has no norm but such as are folded."""
    norms = (getattr(layer, "norm", None) for layer in module.modules())
    return all(norm is None or is_fixed(norm) for norm in norms)


def _first_linear(head: nn.Module) -> nn.Linear | None:
    """The layer of a box head that reads crops; ``None`` if it is not linear."""
    layers = [m for m in head.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return layers[0] if layers and isinstance(layers[0], nn.Linear) else None
