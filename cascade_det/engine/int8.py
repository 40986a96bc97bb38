"""Layers of a detector in 8 bits; the grids of their maps are measured on images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cascade_det.backbones.int8_resnet import int8_stages
from cascade_det.data.samples import Batch
from cascade_det.engine.detector import CascadeDetector
from cascade_det.engine.fast_types import describe_agreement, detect_all
from cascade_det.engine.optimization import Part
from cascade_det.engine.part_types import PartTypes
from cascade_det.evaluation.agreement import find_again
from cascade_det.layers.folding import is_fixed
from cascade_det.layers.int8 import Grid, Int8Conv2d

# Share of the values beyond either end of a grid; they are clipped.
_BEYOND = 1e-4
# Values of a map that are kept, of every call: all of them would fill the memory.
_SAMPLES = 16384


class Ranges:
    """Grids of what modules read and return, from samples of both.

    Args:
        modules: to watch, see ``watching``.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._read: dict[nn.Module, list[Tensor]] = {module: [] for module in modules}
        self._returned: dict[nn.Module, list[Tensor]] = {module: [] for module in self._read}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep samples of every call."""
        hooks = [module.register_forward_hook(self._keep) for module in self._read]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def of_input(self, module: nn.Module) -> Grid:
        """The grid of what a module reads."""
        return _grid(self._read[module])

    def of_output(self, module: nn.Module, relu: bool) -> Grid:
        """The grid of what a module returns, or of the ReLU of that."""
        returned = self._returned[module]
        return _grid([x.relu() for x in returned] if relu else returned)

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        for kept, x in ((self._read, inputs[0]), (self._returned, output)):
            if isinstance(x, Tensor) and x.numel():
                # In the order of memory, so that a channels-last map is not copied.
                flat = x.permute(0, 2, 3, 1).reshape(-1) if x.dim() == 4 else x.reshape(-1)
                # The same values whatever else is watched.
                generator = torch.Generator().manual_seed(len(kept[module]))
                chosen = torch.randint(len(flat), (_SAMPLES,), generator=generator)
                kept[module].append(flat[chosen])


def _grid(samples: list[Tensor]) -> Grid:
    # A part that no image reached computes zeros of its input, whatever the grid.
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
    """The parts of a detector that shall compute in 8 bits; measures the grids of their maps.

    Args:
        detector: in float32 and evaluation mode, with heads that are not optimised yet.
        parts: before the heads.
        types: of the parts; where none is in 8 bits, nothing is done.
        images: batches to measure with.
    """

    def __init__(
        self,
        detector: CascadeDetector,
        parts: Mapping[str, Part],
        types: PartTypes,
        images: Sequence[Batch],
    ) -> None:
        self.types, self.images = types, images if types.int8 else ()
        self.head_grids: list[Grid] = []
        if not types.int8:
            return
        linears = [linear for head in detector.cascade.box_head if (linear := _first_linear(head))]
        roots = [root for part in parts.values() for root in part.modules]
        # A stage, for what it reads; its blocks and their convolutions.
        layers = [layer for root in roots for layer in root.modules()]
        self.ranges = Ranges([*layers, *linears])
        with self.ranges.watching():
            self.wanted = detect_all(detector, images)
        if "roi_heads" in types.int8:
            self.head_grids = [self.ranges.of_input(linear) for linear in linears]

    def replace(self, model: nn.Module, parts: Mapping[str, Part]) -> list[str]:
        """Replace the layers before the heads, and say so.

        Args:
            model: holds all parts.
            parts: with folded norms, in float32.
        """
        new: dict[nn.Module, nn.Module] = {}
        if "backbone" in self.types.int8:
            stages = parts["backbone"].modules
            inputs = self.ranges.of_input(stages[0])
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

    def compare(self, detector: CascadeDetector) -> list[str]:
        """Compare what an optimised detector detects with float32, and say so."""
        if not self.images:
            return []
        agreement = find_again(detect_all(detector, self.images), self.wanted)
        return [f"On the images that measured its ranges it {describe_agreement(agreement)}."]


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
