"""What optimisation for inference does to the networks of either host."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from cascade_det.backbones.fast_upconv import use_fast_upconv
from cascade_det.backbones.int8_resnet import Int8Block
from cascade_det.backbones.relative_bias import gather_biases
from cascade_det.core import CascadeHead
from cascade_det.core.fast_heads import FastBoxHead
from cascade_det.core.fast_masks import FastMaskHead
from cascade_det.engine.allocator import keep_freed_memory
from cascade_det.engine.part_types import PartTypes
from cascade_det.layers.int8 import Int8Conv2d, QuantisedMap
from cascade_det.layers.rpn_head import RPNHead
from cascade_det.layers.winograd import use_winograd

logger = logging.getLogger(__name__)

LEAN_RPN = "The RPN computes the deltas of its best anchors only."
CHANNELS_LAST = "Images and maps are channels-last."


@dataclass
class Part:
    """Modules of a part, and those of them that take the maps of the part before."""

    modules: list[nn.Module] = field(default_factory=list)
    entrances: list[nn.Module] = field(default_factory=list)


def backbone_parts(
    stem: nn.Module, stages: list[nn.Module], laterals: list[nn.Module], outputs: list[nn.Module]
) -> dict[str, Part]:
    """The parts of a trunk and its pyramid.

    Args:
        stem: takes the images.
        stages: all other layers of the trunk, in order of use.
        laterals: the layers of the pyramid that take maps of the trunk.
        outputs: all its others.
    """
    # A trunk may run the layers of its stem one by one.
    entrance = stem[0] if isinstance(stem, nn.Sequential) else stem
    return {
        "stem": Part([stem], [entrance]),
        "backbone": Part(stages, stages[:1]),
        "fpn": Part(laterals + outputs, laterals),
    }


def rpn_part(head: RPNHead) -> Part:
    """The convolutions of the RPN; its last layers stay float32."""
    convs = list(head.convs)
    return Part(convs, convs[:1])


def set_types(parts: Mapping[str, Part], types: PartTypes) -> str:
    """Convert the weights of all parts that are not in 8 bits, and say so."""
    for name, part in parts.items():
        for module in part.modules:
            module.to(types.floating[name])
    return f"Computes in {types.describe()}; boxes, scores and their layers in float32."


def cast_between(parts: Mapping[str, Part], types: PartTypes) -> None:
    """Convert maps where parts of different types meet; ``parts`` are in order of use."""
    before = {torch.float32}  # of images
    for name, part in parts.items():
        dtype = types.floating[name]
        if before != {dtype}:
            cast_inputs([m for m in part.entrances if not _reads_all_types(m)], dtype)
        # A pyramid also takes maps of the stem.
        of_trunk = {types.computed[name], types.floating["stem"]}
        before = of_trunk if name == "backbone" else {dtype}


def _reads_all_types(module: nn.Module) -> bool:
    first = module[0] if isinstance(module, nn.Sequential) else module
    return isinstance(first, Int8Block | Int8Conv2d)


def cast_inputs(modules: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Convert what modules take."""
    for module in modules:
        module.register_forward_pre_hook(partial(_cast, dtype))


def _cast(
    dtype: torch.dtype, module: nn.Module, inputs: tuple[Tensor | QuantisedMap, ...]
) -> tuple[Tensor, ...]:
    return tuple(x.to(dtype) for x in inputs)


def describe_heads(cascade: CascadeHead) -> str:
    """How many heads of an optimised cascade are fast."""
    counts = [_count("box", cascade.box_head, FastBoxHead)]
    if cascade.masks is not None:
        counts.append(_count("mask", cascade.masks.heads, FastMaskHead))
    return f"{' and '.join(counts)} read regions in the layout of the pooling."


def _count(kind: str, heads: Iterable[nn.Module], fast: type[nn.Module]) -> str:
    are_fast = [isinstance(head, fast) for head in heads]
    return f"{sum(are_fast)} of {len(are_fast)} {kind} heads"


def gather_attention_biases(module: nn.Module) -> list[str]:
    """Gather the biases of attention once, and say so."""
    count = gather_biases(module)
    return [f"The biases of {count} attentions are gathered."] if count else []


def convolve_by_winograd(*parts: nn.Module) -> list[str]:
    """Use Winograd's algorithm where it is faster, and say so."""
    if not (count := sum(map(use_winograd, parts))):
        return []
    return [f"{count} convolutions use Winograd's algorithm on maps that are large enough."]


def upsample_fast(device: torch.device, *parts: nn.Module) -> list[str]:
    """Use the shorter upsampling on CPUs, and say so."""
    if device.type != "cpu" or not (count := sum(map(use_fast_upconv, parts))):
        return []
    return [f"{count} levels upsample with 4/9 of the multiplications."]


def keep_memory(device: torch.device) -> list[str]:
    """Keep the memory of freed tensors on CPUs, and say so."""
    if device.type != "cpu" or not keep_freed_memory():
        return []
    return ["The process keeps the memory of freed tensors for the next ones."]


def log_optimizations(done: Iterable[str]) -> None:
    """Log what was done."""
    logger.info("Optimised for inference:%s", "".join(f"\n  - {sentence}" for sentence in done))
