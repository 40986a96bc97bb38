"""Optimisation of a detector or a segmenter for inference."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import nn

from cascade_det.core.fast_heads import FastBoxHead, head_dtypes
from cascade_det.data.samples import Batch
from cascade_det.engine.devices import describe_dtypes, resolve_fast_dtype
from cascade_det.engine.fast_types import choose_float32_parts
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
    part_dtypes,
    rpn_part,
    set_types,
    spare_trunk,
    upsample_fast,
)
from cascade_det.layers.folding import fold_norms
from cascade_det.standalone.detector import Detector
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
    wanted = resolve_fast_dtype(dtype, detector.device)
    part_dtypes(wanted, float32_parts)  # checks their names
    reasons: list[str] = []
    if images is not None and wanted == torch.float32:
        reasons = ["There are no types to choose by images: all is float32."]
    elif images is not None:
        float32_parts, reasons = choose_float32_parts(
            detector,
            images,
            lambda copied, parts: _optimize(copied, part_dtypes(wanted, parts), False, []),
            float32_parts=float32_parts,
        )
    else:
        float32_parts, reasons = spare_trunk(
            detector.backbone.bottom_up, dtype, wanted, float32_parts
        )
    _optimize(detector, part_dtypes(wanted, float32_parts), compile, reasons)
    log_optimizations(detector.optimizations)
    return detector


def _optimize(
    detector: Detector, dtypes: Mapping[str, torch.dtype], compile: bool, reasons: Iterable[str]
) -> Detector:
    detector.eval().requires_grad_(False)
    detector.proposal_generator.rpn_head.topk_deltas_only = True
    done = [
        *reasons,
        f"{fold_norms(detector)} norms are folded into convolutions.",
        *gather_attention_biases(detector.backbone),
        _use_channels_last(detector, (detector.backbone, detector.proposal_generator)),
        LEAN_RPN,
        set_types(_parts(detector), dtypes),
    ]
    detector.roi_heads.optimize(dtypes["roi_heads"])
    done.append(describe_heads(detector.roi_heads))
    backbone: nn.Module = detector.backbone
    if compile:  # torch.compile needs PyTorch's convolutions
        done += convolve_by_winograd(detector.proposal_generator)
    else:
        done += convolve_by_winograd(detector.proposal_generator, backbone)
        done += upsample_fast(detector.device, backbone)
    cast_between(_parts(detector), dtypes)
    slow = (head for head in detector.roi_heads.box_head if not isinstance(head, FastBoxHead))
    cast_inputs(slow, torch.float32)
    done += keep_memory(detector.device)
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
