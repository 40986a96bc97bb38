"""A detector made faster, for inference alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from cascade_det.backbones import ResNet
from cascade_det.config.cascade_keys import FAST_PARTS as PARTS
from cascade_det.core.fast_heads import FastBoxHead, fast_dtype
from cascade_det.engine.allocator import keep_freed_memory
from cascade_det.engine.devices import describe_dtypes, resolve_fast_dtype
from cascade_det.layers.folding import fold_norms
from cascade_det.layers.winograd import use_winograd
from cascade_det.standalone.detector import Detector

logger = logging.getLogger(__name__)

FLOAT32_PARTS: tuple[str, ...] = ()


def optimize(
    detector: Detector,
    *,
    dtype: str = "auto",
    float32_parts: Collection[str] = FLOAT32_PARTS,
    compile: bool = False,
) -> Detector:
    """Make a detector faster, in place; it can do nothing but detect afterwards.

    Norms are folded into convolutions, maps are channels-last, the RPN computes deltas of its best
    anchors alone, heads take regions as they are pooled, and all of it is in the type that the
    device is fastest in: in float32 detections are the same up to rounding, in the others nearly
    so. On CPUs, large float32 convolutions are Winograd's, and the process keeps the memory of
    freed tensors. What was done is logged, and kept in ``detector.optimizations``.

    Call it after weights are loaded: their names are others afterwards.

    Args:
        detector: with its weights, on its device.
        dtype: see ``cascade_det.engine.devices.resolve_fast_dtype``.
        float32_parts: of ``cascade_det.config.cascade_keys.FAST_PARTS``, those that stay float32.
        compile: ``torch.compile`` backbone and pyramid, as CUDA graphs on GPUs. Each new size of
            images is recorded anew there, so that it pays where there are few. Float32 on CPUs is
            not compiled: its time goes into convolutions, which stay what they are.

    Returns:
        The detector, in evaluation mode.

    Raises:
        ConfigError: float16 on a CPU.
        ValueError: an unknown part, or a detector that is optimised already.
    """
    if detector.optimizations:
        raise ValueError("the detector is optimised already: build it again for other settings")
    if unknown := set(float32_parts) - set(PARTS):
        raise ValueError(f"unknown parts {sorted(unknown)}; known: {', '.join(PARTS)}")
    wanted = resolve_fast_dtype(dtype, detector.device)
    dtypes = {part: torch.float32 if part in float32_parts else wanted for part in PARTS}
    detector.eval().requires_grad_(False)
    done = [_fold(detector), _reorder(detector), _lean(detector), _set_types(detector, dtypes)]
    done.append(_optimize_heads(detector, dtypes["roi_heads"]))
    # What is compiled calls PyTorch's own.
    parts = [detector.proposal_generator, *(() if compile else (detector.backbone,))]
    if count := sum(map(use_winograd, parts)):
        done.append(f"{count} convolutions are Winograd's where maps are large enough.")
    _cast_between(detector, dtypes)
    if detector.device.type == "cpu" and keep_freed_memory():
        done.append("The memory of freed tensors is kept for the next ones, process-wide.")
    if compile:
        done.append(_compile(detector, dtypes))
    # Heads that cannot be made fast stay as they are.
    detector.dtype = describe_dtypes(
        {**dtypes, "roi_heads": fast_dtype(detector.roi_heads.box_head)}
    )
    detector.optimizations = done
    logger.info("Optimised for inference:%s", "".join(f"\n  - {sentence}" for sentence in done))
    return detector


@dataclass
class _Part:
    """Modules of a part of the body, and those among them that take maps of the part before."""

    modules: list[nn.Module]
    entrances: list[nn.Module]


def _body(detector: Detector) -> dict[str, _Part]:
    backbone = detector.backbone
    trunk: nn.Module = backbone.get_submodule("bottom_up")
    # Of a MobileNet, whose layers are all in one sequence, the first one is the stem.
    stem, *stages = (
        [trunk.stem, *(trunk.get_submodule(name) for name in trunk.stage_names)]
        if isinstance(trunk, ResNet)
        else trunk.get_submodule("features").children()
    )
    laterals, outputs = (
        [backbone.get_submodule(f"fpn_{kind}{level}") for level in backbone.levels]
        for kind in ("lateral", "output")
    )
    conv = detector.proposal_generator.rpn_head.conv
    convs = list(conv) if isinstance(conv, nn.Sequential) else [conv]
    return {
        "stem": _Part([stem], [stem]),
        "backbone": _Part(stages, stages[:1]),
        "fpn": _Part(laterals + outputs, laterals),
        "rpn": _Part(convs, convs[:1]),
    }


def _fold(detector: Detector) -> str:
    return f"{fold_norms(detector)} norms are folded into convolutions."


def _reorder(detector: Detector) -> str:
    for part in (detector.backbone, detector.proposal_generator):
        part.to(memory_format=torch.channels_last)
    detector.memory_format = torch.channels_last
    return "Images and maps are in channels-last order."


def _lean(detector: Detector) -> str:
    detector.proposal_generator.rpn_head.lean = True
    return "The RPN computes deltas of its best anchors alone."


def _set_types(detector: Detector, dtypes: Mapping[str, torch.dtype]) -> str:
    for name, part in _body(detector).items():
        for module in part.modules:
            module.to(dtypes[name])
    return f"Computed in {describe_dtypes(dtypes)}. Boxes, scores and last layers in float32."


def _cast_between(detector: Detector, dtypes: Mapping[str, torch.dtype]) -> None:
    """Let maps change their type where they go from one part to another."""
    before = torch.float32  # of images
    for name, part in _body(detector).items():
        if dtypes[name] != before:
            for module in part.entrances:
                module.register_forward_pre_hook(partial(_cast, dtypes[name]))
        before = dtypes[name]
    for head in detector.roi_heads.box_head:
        if not isinstance(head, FastBoxHead):
            head.register_forward_pre_hook(partial(_cast, torch.float32))


def _cast(dtype: torch.dtype, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.to(dtype) for x in inputs)


def _optimize_heads(detector: Detector, dtype: torch.dtype) -> str:
    detector.roi_heads.optimize(dtype)
    heads = list(detector.roi_heads.box_head)
    count = sum(isinstance(head, FastBoxHead) for head in heads)
    return f"{count} of {len(heads)} box heads take regions in the layout of the pooling."


def _compile(detector: Detector, dtypes: Mapping[str, torch.dtype]) -> str:
    is_gpu = detector.device.type == "cuda"
    if not is_gpu and dtypes["backbone"] == torch.float32:
        return "Nothing is compiled: float32 on a CPU gains nothing from it."
    if is_gpu:
        detector.backbone.compile(dynamic=True, mode="reduce-overhead")
    else:
        # Weights as constants, laid out for the kernels once.
        detector.backbone.compile(dynamic=True, options={"freezing": True})
    side = 8 * detector.backbone.size_divisibility
    image = torch.zeros(3, side, side + detector.backbone.size_divisibility, dtype=torch.uint8)
    started = time.perf_counter()
    with torch.inference_mode():
        detector.backbone(detector.preprocess([image])[0])
    seconds = time.perf_counter() - started
    return (
        f"Backbone and pyramid are compiled, which took {seconds:.0f} s for single images; it "
        "takes as long again at the first batch of several."
    )
