"""Optimisation of a detector or a segmenter for inference."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import nn

from cascade_det.backbones.resnet import RESIDUAL_BLOCKS
from cascade_det.core.fast_heads import FastBoxHead, head_dtypes
from cascade_det.data.samples import Batch
from cascade_det.engine.devices import describe_dtypes
from cascade_det.engine.fast_types import resolve_types
from cascade_det.engine.int8 import Int8, Ranges, int8_parts
from cascade_det.engine.optimization import (
    CHANNELS_LAST,
    LEAN_RPN,
    Part,
    backbone_parts,
    cast_between,
    cast_inputs,
    convolve_by_winograd,
    describe_heads,
    gather_attention_biases,
    keep_memory,
    log_optimizations,
    rpn_part,
    set_types,
    upsample_fast,
)
from cascade_det.engine.part_types import PartTypes
from cascade_det.layers.folding import fold_norms
from cascade_det.standalone.detector import Detector
from cascade_det.standalone.front import Front
from cascade_det.standalone.segmenter_base import SegmenterBase


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
        dtype: see ``cascade_det.engine.fast_types.resolve_types``.
        float32_parts: parts that stay float32, of ``cascade_det.config.cascade_keys.FAST_PARTS``.
        compile: ``torch.compile`` the backbone, on GPUs with the RPN up to its NMS and as CUDA
            graphs. Every new image size is recorded again there, so that it pays for few sizes.
            Float32 on CPUs is not compiled, because convolutions take most of its time and do not
            change.
        images: batches like those that the detector will be given. With the types ``auto``,
            ``bfloat16`` and ``float16`` the parts that stay float32 beside ``float32_parts`` are
            chosen by what is detected in them, see ``choose_types``; candidates are not compiled.
            With ``int8`` the ranges of maps are measured with them.

    Returns:
        The detector, in evaluation mode.

    Raises:
        ConfigError: float16 on a CPU, or int8 without images or on a device that lacks it.
        ValueError: an unknown part, too few detections in ``images``, or the detector is optimised
            already.
    """
    if detector.optimizations:
        raise ValueError("the detector is optimised already: build it again for other settings")
    detector.eval()
    ranges = Ranges(images or ())
    in_8_bits = int8_parts(_parts(detector), detector.roi_heads.box_head, RESIDUAL_BLOCKS)
    types, reasons = resolve_types(
        detector,
        detector.backbone.bottom_up,
        lambda copied, types: _optimize(copied, types, ranges, compile=False),
        dtype=dtype,
        float32_parts=float32_parts,
        int8_parts=in_8_bits,
        images=images,
    )
    _optimize(detector, types, ranges, reasons, compile=compile)
    if types.int8:
        detector.optimizations.append(ranges.compare(detector))
    log_optimizations(detector.optimizations)
    return detector


def _optimize(
    detector: Detector,
    types: PartTypes,
    ranges: Ranges,
    reasons: Iterable[str] = (),
    *,
    compile: bool,
) -> Detector:
    detector.eval().requires_grad_(False)
    int8 = Int8(detector, types, ranges)
    detector.proposal_generator.rpn_head.topk_deltas_only = True
    done = [
        *reasons,
        f"{fold_norms(detector)} norms are folded into convolutions.",
        *gather_attention_biases(detector.backbone),
        _use_channels_last(detector, (detector.backbone, detector.proposal_generator)),
        LEAN_RPN,
        *int8.replace(detector, _parts(detector)),
        set_types(_parts(detector), types),
    ]
    detector.roi_heads.optimize(types.floating["roi_heads"], int8.head_grids)
    done.append(describe_heads(detector.roi_heads))
    backbone: nn.Module = detector.backbone
    if compile:  # torch.compile needs PyTorch's convolutions
        done += convolve_by_winograd(detector.proposal_generator)
    else:
        done += convolve_by_winograd(detector.proposal_generator, backbone)
        done += upsample_fast(detector.device, backbone)
    cast_between(_parts(detector), types)
    slow = (head for head in detector.roi_heads.box_head if not isinstance(head, FastBoxHead))
    cast_inputs(slow, torch.float32)
    done += keep_memory(detector.device)
    if compile:
        done.append(_compile(detector, types))
    # Heads of unknown kinds stay as they are.
    heads = [("roi_heads", kind) for kind in head_dtypes(detector.roi_heads.box_head)]
    before = [(name, kind) for name, kind in types.computed.items() if name != "roi_heads"]
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
        *gather_attention_biases(segmenter),
        _use_channels_last(segmenter, (segmenter,)),
        *convolve_by_winograd(segmenter),
        *upsample_fast(segmenter.device, segmenter),
        *keep_memory(segmenter.device),
    ]
    log_optimizations(segmenter.optimizations)
    return segmenter


def _parts(detector: Detector) -> dict[str, Part]:
    backbone = detector.backbone
    return {
        **backbone_parts(*backbone.bottom_up.stem_and_stages(), *backbone.laterals_and_outputs()),
        "rpn": rpn_part(detector.proposal_generator.rpn_head),
    }


def _use_channels_last(model: Detector | SegmenterBase, parts: Iterable[nn.Module]) -> str:
    for part in parts:
        part.to(memory_format=torch.channels_last)
    model.memory_format = torch.channels_last
    return CHANNELS_LAST


def _compile(detector: Detector, types: PartTypes) -> str:
    is_gpu = detector.device.type == "cuda"
    if not is_gpu and types.floating["backbone"] == torch.float32:
        return "Nothing is compiled: float32 on a CPU would not gain from it."
    if types.int8 & {"backbone", "fpn"}:
        return "Nothing is compiled: layers in 8 bits cannot be."
    network: nn.Module = detector.backbone
    if is_gpu:
        front = Front(detector.backbone, detector.proposal_generator)
        front.compile(dynamic=True, mode="reduce-overhead")
        detector.use_front(front)
        network = front
    else:
        # Freezing turns weights into constants in the layout of the kernels.
        detector.backbone.compile(dynamic=True, options={"freezing": True})
    side = 8 * detector.backbone.size_divisibility
    image = torch.zeros(3, side, side + detector.backbone.size_divisibility, dtype=torch.uint8)
    started = time.perf_counter()
    with torch.inference_mode():
        network(detector.preprocess([image])[0])
    seconds = time.perf_counter() - started
    parts = "Backbone, pyramid and RPN up to its NMS" if is_gpu else "Backbone and pyramid"
    return (
        f"{parts} are compiled, which took {seconds:.0f} s for single images; the "
        "first batch of several takes as long again."
    )
