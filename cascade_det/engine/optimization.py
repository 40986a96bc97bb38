"""What optimisation for inference does to the networks of either host."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from cascade_det.backbones.fast_upconv import use_fast_upconv
from cascade_det.backbones.relative_bias import gather_biases
from cascade_det.config.cascade_keys import FAST_PARTS as PARTS
from cascade_det.core import CascadeHead
from cascade_det.core.fast_heads import FastBoxHead
from cascade_det.core.fast_masks import FastMaskHead
from cascade_det.engine.allocator import keep_freed_memory
from cascade_det.engine.devices import describe_dtypes
from cascade_det.engine.fast_types import changes_in_bfloat16
from cascade_det.layers.rpn_head import RPNHead
from cascade_det.layers.winograd import use_winograd

logger = logging.getLogger(__name__)

LEAN_RPN = "The RPN computes the deltas of its best anchors only."
CHANNELS_LAST = "Images and maps are channels-last."


def part_dtypes(dtype: torch.dtype, float32_parts: Collection[str]) -> dict[str, torch.dtype]:
    """The type of each of ``FAST_PARTS``.

    Raises:
        ValueError: an unknown part.
    """
    if unknown := set(float32_parts) - set(PARTS):
        raise ValueError(f"unknown parts {sorted(unknown)}; known: {', '.join(PARTS)}")
    return {part: torch.float32 if part in float32_parts else dtype for part in PARTS}


def spare_trunk(
    trunk: object, name: str, dtype: torch.dtype, float32_parts: Collection[str]
) -> tuple[Collection[str], list[str]]:
    """Parts that stay float32: under ``auto``, also trunks whose detections change there.

    Args:
        trunk: of the detector.
        name: of the type that was asked for.
        dtype: what it is on the device.
        float32_parts: that stay float32 in any case.

    Returns:
        The parts, and sentences that say why.
    """
    if (name, dtype) != ("auto", torch.bfloat16) or not changes_in_bfloat16(trunk):
        return float32_parts, []
    return {"stem", "backbone", *float32_parts}, [
        "The backbone stays float32: detections change noticeably in bfloat16 with such backbones."
    ]


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


def set_types(parts: Mapping[str, Part], dtypes: Mapping[str, torch.dtype]) -> str:
    """Convert the weights of all parts, and say so."""
    for name, part in parts.items():
        for module in part.modules:
            module.to(dtypes[name])
    types = describe_dtypes(dtypes.items())
    return f"Computes in {types}; boxes, scores and their layers in float32."


def cast_between(parts: Mapping[str, Part], dtypes: Mapping[str, torch.dtype]) -> None:
    """Convert maps where parts of different types meet; ``parts`` are in order of use."""
    before = {torch.float32}  # of images
    for name, part in parts.items():
        if before != {dtypes[name]}:
            cast_inputs(part.entrances, dtypes[name])
        # A pyramid also takes maps of the stem.
        before = {dtypes[name], dtypes["stem"]} if name == "backbone" else {dtypes[name]}


def cast_inputs(modules: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Convert what modules take."""
    for module in modules:
        module.register_forward_pre_hook(partial(_cast, dtype))


def _cast(dtype: torch.dtype, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
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
