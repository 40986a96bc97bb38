"""Optimisation of a detector or a segmenter for inference."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from cascade_det.backbones.fast_upconv import use_fast_upconv
from cascade_det.backbones.relative_bias import gather_biases
from cascade_det.config.cascade_keys import FAST_PARTS as PARTS
from cascade_det.core.fast_heads import FastBoxHead, head_dtypes
from cascade_det.core.fast_masks import FastMaskHead
from cascade_det.data.samples import Batch
from cascade_det.engine.allocator import keep_freed_memory
from cascade_det.engine.devices import describe_dtypes, resolve_fast_dtype
from cascade_det.engine.fast_types import changes_in_bfloat16, choose_float32_parts
from cascade_det.layers.folding import fold_norms
from cascade_det.layers.winograd import use_winograd
from cascade_det.standalone.detector import Detector
from cascade_det.standalone.segmenter_base import SegmenterBase

logger = logging.getLogger(__name__)

_TRUNK = "The backbone stays float32: detections change noticeably in bfloat16 with such backbones."


def optimize(
    detector: Detector,
    *,
    dtype: str = "auto",
    float32_parts: Collection[str] = (),
    compile: bool = False,
    images: Sequence[Batch] | None = None,
) -> Detector:
    """Optimise a detector for inference in place; it cannot be trained afterwards.

    Folds norms into convolutions, uses channels-last maps, computes only the RPN deltas of the best
    anchors, makes box and mask heads read regions in the layout of the pooling, and computes in the
    fastest type of the device. Detections in float32 stay equal up to rounding, in other types
    nearly. On CPUs, large float32 convolutions use Winograd's algorithm, and the process keeps the
    memory of freed tensors. The changes are logged and listed in ``detector.optimizations``.

    Load weights first: the state dict has other names afterwards.

    Args:
        detector: with its weights, on its device.
        dtype: see ``cascade_det.engine.devices.resolve_fast_dtype``.
        float32_parts: parts that stay float32, of ``cascade_det.config.cascade_keys.FAST_PARTS``.
        compile: ``torch.compile`` the backbone, on GPUs as CUDA graphs. Every new image size is
            recorded again there, so that it pays for few sizes. Float32 on CPUs is not compiled,
            because convolutions take most of its time and do not change.
        images: batches like those that the detector will be given. Then the parts that stay float32
            beside ``float32_parts`` are chosen by what is detected in them, see
            ``choose_float32_parts``; candidates are not compiled. Without images and with the type
            ``auto``, trunks whose detections change noticeably in bfloat16 stay float32.

    Returns:
        The detector, in evaluation mode.

    Raises:
        ConfigError: float16 on a CPU.
        ValueError: an unknown part, too few detections in ``images``, or the detector is optimised
            already.
    """
    if detector.optimizations:
        raise ValueError("the detector is optimised already: build it again for other settings")
    if unknown := set(float32_parts) - set(PARTS):
        raise ValueError(f"unknown parts {sorted(unknown)}; known: {', '.join(PARTS)}")
    wanted = resolve_fast_dtype(dtype, detector.device)
    reasons: list[str] = []
    if images is not None and wanted == torch.float32:
        reasons = ["There are no types to choose by images: all is float32."]
    elif images is not None:
        float32_parts, reasons = choose_float32_parts(
            detector,
            images,
            lambda copied, parts: _optimize(copied, _types(wanted, parts), False, []),
            float32_parts=float32_parts,
        )
    elif (dtype, wanted) == ("auto", torch.bfloat16) and changes_in_bfloat16(
        detector.backbone.bottom_up
    ):
        float32_parts = {"stem", "backbone", *float32_parts}
        reasons = [_TRUNK]
    _optimize(detector, _types(wanted, float32_parts), compile, reasons)
    _log(detector.optimizations)
    return detector


def _types(wanted: torch.dtype, float32_parts: Collection[str]) -> dict[str, torch.dtype]:
    return {part: torch.float32 if part in float32_parts else wanted for part in PARTS}


def _optimize(
    detector: Detector, dtypes: Mapping[str, torch.dtype], compile: bool, reasons: Iterable[str]
) -> Detector:
    detector.eval().requires_grad_(False)
    detector.proposal_generator.rpn_head.topk_deltas_only = True
    done = [
        *reasons,
        f"{fold_norms(detector)} norms are folded into convolutions.",
        *_gather_biases(detector.backbone),
        _use_channels_last(detector, (detector.backbone, detector.proposal_generator)),
        "The RPN computes the deltas of its best anchors only.",
        _set_types(detector, dtypes),
        _optimize_heads(detector, dtypes["roi_heads"]),
    ]
    backbone: nn.Module = detector.backbone
    if compile:  # torch.compile needs PyTorch's convolutions
        done += _use_winograd(detector.proposal_generator)
    else:
        done += _use_winograd(detector.proposal_generator, backbone)
        done += _upsample_fast(detector.device, backbone)
    _cast_between(detector, dtypes)
    done += _keep_memory(detector.device)
    if compile:
        done.append(_compile(detector, dtypes))
    # Heads of unknown kinds stay as they are.
    heads = [("roi_heads", kind) for kind in head_dtypes(detector.roi_heads.box_head)]
    before = [(name, kind) for name, kind in dtypes.items() if name != "roi_heads"]
    detector.dtype = describe_dtypes([*before, *heads])
    detector.optimizations = done
    return detector


def optimize_segmenter(segmenter: SegmenterBase) -> SegmenterBase:
    """Optimise a segmenter for inference in place; it cannot be trained afterwards.

    As ``optimize``, in float32: folds norms into convolutions and uses channels-last maps; on CPUs
    large convolutions use Winograd's algorithm, other upsampling a shorter one, and the process
    keeps the memory of freed tensors. Logits stay equal up to rounding. Load weights first.

    Returns:
        The segmenter, in evaluation mode; the changes are listed in its ``optimizations``.

    Raises:
        ValueError: the segmenter is optimised already.
    """
    if segmenter.optimizations:
        raise ValueError("the segmenter is optimised already")
    segmenter.eval().requires_grad_(False)
    segmenter.optimizations = [
        f"{fold_norms(segmenter)} norms are folded into convolutions.",
        *_gather_biases(segmenter),
        _use_channels_last(segmenter, (segmenter,)),
        *_use_winograd(segmenter),
        *_upsample_fast(segmenter.device, segmenter),
        *_keep_memory(segmenter.device),
    ]
    _log(segmenter.optimizations)
    return segmenter


def _log(done: Iterable[str]) -> None:
    logger.info("Optimised for inference:%s", "".join(f"\n  - {sentence}" for sentence in done))


def _gather_biases(module: nn.Module) -> list[str]:
    count = gather_biases(module)
    return [f"The biases of {count} attentions are gathered."] if count else []


def _use_winograd(*parts: nn.Module) -> list[str]:
    if not (count := sum(map(use_winograd, parts))):
        return []
    return [f"{count} convolutions use Winograd's algorithm on maps that are large enough."]


def _upsample_fast(device: torch.device, *parts: nn.Module) -> list[str]:
    if device.type != "cpu" or not (count := sum(map(use_fast_upconv, parts))):
        return []
    return [f"{count} levels upsample with 4/9 of the multiplications."]


def _keep_memory(device: torch.device) -> list[str]:
    if device.type != "cpu" or not keep_freed_memory():
        return []
    return ["The process keeps the memory of freed tensors for the next ones."]


@dataclass
class _Part:
    """Modules of a part, and those of them that take the maps of the part before."""

    modules: list[nn.Module]
    entrances: list[nn.Module]


def _parts(detector: Detector) -> dict[str, _Part]:
    backbone = detector.backbone
    stem, stages = backbone.bottom_up.stem_and_stages()
    laterals, outputs = backbone.laterals_and_outputs()
    # A trunk may run the layers of its stem one by one.
    entrance = stem[0] if isinstance(stem, nn.Sequential) else stem
    conv = detector.proposal_generator.rpn_head.conv
    convs = list(conv) if isinstance(conv, nn.Sequential) else [conv]
    return {
        "stem": _Part([stem], [entrance]),
        "backbone": _Part(stages, stages[:1]),
        "fpn": _Part(laterals + outputs, laterals),
        "rpn": _Part(convs, convs[:1]),
    }


def _use_channels_last(model: Detector | SegmenterBase, parts: Iterable[nn.Module]) -> str:
    for part in parts:
        part.to(memory_format=torch.channels_last)
    model.memory_format = torch.channels_last
    return "Images and maps are channels-last."


def _set_types(detector: Detector, dtypes: Mapping[str, torch.dtype]) -> str:
    for name, part in _parts(detector).items():
        for module in part.modules:
            module.to(dtypes[name])
    return (
        f"Computes in {describe_dtypes(dtypes.items())}; boxes, scores and their layers in float32."
    )


def _cast_between(detector: Detector, dtypes: Mapping[str, torch.dtype]) -> None:
    """Convert maps where parts of different types meet."""
    before = {torch.float32}  # of images
    for name, part in _parts(detector).items():
        if before != {dtypes[name]}:
            for module in part.entrances:
                module.register_forward_pre_hook(partial(_cast, dtypes[name]))
        # A pyramid also takes maps of the stem.
        before = {dtypes[name], dtypes["stem"]} if name == "backbone" else {dtypes[name]}
    for head in detector.roi_heads.box_head:
        if not isinstance(head, FastBoxHead):
            head.register_forward_pre_hook(partial(_cast, torch.float32))


def _cast(dtype: torch.dtype, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.to(dtype) for x in inputs)


def _optimize_heads(detector: Detector, dtype: torch.dtype) -> str:
    detector.roi_heads.optimize(dtype)
    counts = [_count("box", detector.roi_heads.box_head, FastBoxHead)]
    if detector.roi_heads.masks is not None:
        counts.append(_count("mask", detector.roi_heads.masks.heads, FastMaskHead))
    return f"{' and '.join(counts)} read regions in the layout of the pooling."


def _count(kind: str, heads: Iterable[nn.Module], fast: type[nn.Module]) -> str:
    are_fast = [isinstance(head, fast) for head in heads]
    return f"{sum(are_fast)} of {len(are_fast)} {kind} heads"


def _compile(detector: Detector, dtypes: Mapping[str, torch.dtype]) -> str:
    is_gpu = detector.device.type == "cuda"
    if not is_gpu and dtypes["backbone"] == torch.float32:
        return "Nothing is compiled: float32 on a CPU would not gain from it."
    if is_gpu:
        detector.backbone.compile(dynamic=True, mode="reduce-overhead")
    else:
        # Freezing turns weights into constants in the layout of the kernels.
        detector.backbone.compile(dynamic=True, options={"freezing": True})
    side = 8 * detector.backbone.size_divisibility
    image = torch.zeros(3, side, side + detector.backbone.size_divisibility, dtype=torch.uint8)
    started = time.perf_counter()
    with torch.inference_mode():
        detector.backbone(detector.preprocess([image])[0])
    seconds = time.perf_counter() - started
    return (
        f"Backbone and pyramid are compiled, which took {seconds:.0f} s for single images; the "
        "first batch of several takes as long again."
    )
