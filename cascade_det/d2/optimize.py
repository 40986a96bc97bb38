"""Optimisation of a whole model of Detectron2 for inference."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.backbone import resnet
from torch import Tensor, nn

from cascade_det.backbones.resnet import RESIDUAL_BLOCKS
from cascade_det.core.fast_heads import head_dtypes
from cascade_det.d2.detector import Detector
from cascade_det.d2.fast_parts import (
    Pyramid,
    fast_pyramid,
    fast_rpn_head,
    kind_of,
    stem_and_stages,
)
from cascade_det.d2.roi_heads import EarlyExitCascadeROIHeads
from cascade_det.d2.tile_gate import gate_tiles, say_why_whole
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
from cascade_det.layers.int8 import Grid
from cascade_det.layers.rpn_head import RPNHead

_PARTS = ("backbone", "proposal_generator", "roi_heads")
_REASON = (
    ": its norms are folded and its weights converted. Build it again without "
    "cascade_det.d2.optimize() and without MODEL.CASCADE.FAST.ENABLED"
)
_NO_TRAINING = f"an optimised model cannot be trained{_REASON}"


def optimize(
    model: GeneralizedRCNN,
    *,
    dtype: str = "auto",
    float32_parts: Collection[str] = (),
    images: Sequence[Batch] | None = None,
) -> GeneralizedRCNN:
    """Optimise a model of Detectron2 for inference in place; it cannot be trained afterwards.

    As ``cascade_det.standalone.optimize``, for ``EarlyExitCascadeROIHeads``, Detectron2's RPN, and
    its ResNets or our backbones with a feature pyramid. Parts of other kinds stay as they are, in
    float32. The changes, and what stays, are logged and listed in ``model.optimizations``;
    ``model.dtype`` describes the types.

    Load weights first: an optimised model neither saves nor loads a state dict. Call it under
    ``torch.no_grad``, as ``DefaultPredictor`` and Detectron2's evaluation do.

    Args:
        model: with its weights, on its device.
        dtype: see ``cascade_det.engine.fast_types.resolve_types``.
        float32_parts: parts that stay float32, of ``cascade_det.config.cascade_keys.FAST_PARTS``.
        images: batches like those that the model will be given, to choose types or to measure the
            ranges of maps with, see ``cascade_det.standalone.optimize``; only for models with
            ``EarlyExitCascadeROIHeads``.

    Returns:
        The model, in evaluation mode.

    Raises:
        ConfigError: float16 on a CPU, or int8 without images or on a device that lacks it.
        ValueError: not a ``GeneralizedRCNN``, an unknown part, too few detections in ``images``,
            images for a model with other heads, or the model is optimised already.
    """
    if not isinstance(model, GeneralizedRCNN):
        raise ValueError(f"optimize() takes a GeneralizedRCNN, not a {type(model).__name__}")
    if hasattr(model, "optimizations"):
        raise ValueError("the model is optimised already: build it again for other settings")
    detector = Detector(model.eval())
    has_heads = isinstance(model.roi_heads, EarlyExitCascadeROIHeads)
    if images is not None and not has_heads:
        raise ValueError("images need a model with EarlyExitCascadeROIHeads, to detect in them")
    if has_heads:
        model.roi_heads.use_fast_copies(None)  # which MODEL.CASCADE.FAST has made
        model.roi_heads.whole_map_reason = None  # no warning from what is compared here
    ranges = Ranges(images or ())
    types, reasons = resolve_types(
        detector,
        getattr(model.backbone, "bottom_up", model.backbone),
        lambda copied, types: _optimized(copied, types, ranges),
        dtype=dtype,
        float32_parts=float32_parts,
        int8_parts=_int8_parts(detector) if images is not None else (),
        images=images,
    )
    _optimize(detector, types, ranges, reasons)
    if types.int8:
        model.optimizations.append(ranges.compare(detector))
    _refuse_training_and_saving(model)
    log_optimizations(model.optimizations)
    return model


def _optimized(detector: Detector, types: PartTypes, ranges: Ranges) -> Detector:
    _optimize(detector, types, ranges)
    return detector


def _optimize(
    detector: Detector,
    types: PartTypes,
    ranges: Ranges,
    reasons: Iterable[str] = (),
) -> None:
    model: Any = detector.model
    model.eval().requires_grad_(False)
    pyramid, head = fast_pyramid(model.backbone), fast_rpn_head(model.proposal_generator)
    kept = list(_kept(model, pyramid, head))
    types = types.without(_unknown(model, pyramid, head))
    done = list(reasons)
    int8 = Int8(detector, types, ranges)
    if pyramid is not None:
        model.backbone = pyramid
        pyramid.register_forward_pre_hook(_channels_last)
        done += [
            f"{fold_norms(pyramid)} norms are folded into convolutions.",
            *gather_attention_biases(pyramid),
            CHANNELS_LAST,
        ]
    if head is not None:
        done.append(LEAN_RPN)
    done += int8.replace(model, _parts(pyramid, head))
    done += _optimize_parts(model, pyramid, head, types, int8.head_grids)
    if kept or type(model.roi_heads) is not EarlyExitCascadeROIHeads:
        _give_float32(model.backbone, head, types)
    if kept:
        done.append(f"As before, in float32: {', '.join(kept)}.")
    if isinstance(model.roi_heads, EarlyExitCascadeROIHeads):
        readers = kept or list(_overriding(detector))
        why = f"{', '.join(readers)} may read all of it" if readers else gate_tiles(model)
        done += say_why_whole(model.roi_heads, why)
    model.optimizations = done
    model.dtype = _describe(model.roi_heads, types)  # as of the standalone detector


def _int8_parts(detector: Detector) -> set[str]:
    """Parts that can be in 8 bits, of a copy, since known parts become ours."""
    model: Any = copy.deepcopy(detector.model)
    pyramid, head = fast_pyramid(model.backbone), fast_rpn_head(model.proposal_generator)
    blocks = (*RESIDUAL_BLOCKS, resnet.BasicBlock, resnet.BottleneckBlock)
    return int8_parts(_parts(pyramid, head), detector.cascade.box_head, blocks)


def _unknown(model: Any, pyramid: Pyramid | None, head: RPNHead | None) -> Iterator[str]:
    """The parts that stay as they are, in float32."""
    if pyramid is None:
        yield from ("stem", "backbone", "fpn")
    if head is None:
        yield "rpn"
    if not isinstance(model.roi_heads, EarlyExitCascadeROIHeads):
        yield "roi_heads"


def _optimize_parts(
    model: Any,
    pyramid: Pyramid | None,
    head: RPNHead | None,
    types: PartTypes,
    grids: Sequence[Grid],
) -> Iterator[str]:
    """Convert known parts, and say so."""
    networks = [x for x in (pyramid, head) if x is not None]
    for network in networks:
        network.to(memory_format=torch.channels_last)
    yield set_types(_parts(pyramid, head), types)
    heads = model.roi_heads
    if isinstance(heads, EarlyExitCascadeROIHeads):
        heads.use_fast_copies(str(types.floating["roi_heads"]).removeprefix("torch."), grids)
        cast_inputs(heads.box_head, torch.float32)  # of those that have no fast copy
        heads.follow_predictors()
        yield describe_heads(heads.cascade)
    yield from convolve_by_winograd(*networks)
    yield from upsample_fast(model.device, *networks)
    cast_between(_parts(pyramid, head), types)
    yield from keep_memory(model.device)


def _parts(pyramid: Pyramid | None, head: RPNHead | None) -> dict[str, Part]:
    parts = {}
    if pyramid is not None:
        layers = stem_and_stages(pyramid.bottom_up)
        parts = backbone_parts(*layers, *pyramid.laterals_and_outputs())
    return parts if head is None else {**parts, "rpn": rpn_part(head)}


def _kept(model: Any, pyramid: Pyramid | None, head: RPNHead | None) -> Iterator[str]:
    """The parts that stay Detectron2's or the user's."""
    heads = model.roi_heads
    if pyramid is None:
        yield f"backbone ({kind_of(model.backbone)})"
    if head is None and model.proposal_generator is not None:
        yield f"proposal_generator ({kind_of(model.proposal_generator)})"
    if not isinstance(heads, EarlyExitCascadeROIHeads):
        yield f"roi_heads ({kind_of(heads)})"
    else:
        heads.follow_predictors()
        if heads.mask_on and heads.cascade.masks is None:
            yield f"mask_head ({kind_of(heads.mask_head)})"
        if heads.keypoint_on:
            yield f"keypoint_head ({kind_of(heads.keypoint_head)})"
    for name, child in model.named_children():
        if name not in _PARTS:
            yield f"{name} ({kind_of(child)})"


def _overriding(detector: Detector) -> Iterator[str]:
    """The model and the heads, if they are of a user's class."""
    model: Any = detector.model
    if not detector.has_stages:
        yield kind_of(model)
    if type(model.roi_heads) is not EarlyExitCascadeROIHeads:
        yield f"roi_heads ({kind_of(model.roi_heads)})"


def _describe(heads: nn.Module, types: PartTypes) -> str:
    own = [torch.float32]
    if isinstance(heads, EarlyExitCascadeROIHeads):
        own = head_dtypes(heads.cascade.box_head)
    before = [(name, dtype) for name, dtype in types.computed.items() if name != "roi_heads"]
    return describe_dtypes([*before, *(("roi_heads", dtype) for dtype in own)])


def _channels_last(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].contiguous(memory_format=torch.channels_last),)


def _give_float32(backbone: nn.Module, head: RPNHead | None, types: PartTypes) -> None:
    """Give maps in float32 to parts that are not known to read others."""
    if types.floating["fpn"] == torch.float32:
        return
    backbone.register_forward_hook(_to_float32)
    if head is not None and "rpn" not in types.int8:
        cast_inputs(head.convs[:1], types.floating["rpn"])


def _to_float32(
    module: nn.Module, inputs: tuple[Tensor], maps: dict[str, Tensor]
) -> dict[str, Tensor]:
    return {name: x.float() for name, x in maps.items()}


def _refuse_training_and_saving(model: Any) -> None:
    model.train = partial(_train, model)
    model.register_forward_pre_hook(_refuse_losses)
    model.register_state_dict_pre_hook(_refuse_saving)
    model.register_load_state_dict_pre_hook(_refuse_loading)


def _train(model: Any, mode: bool | None = None) -> Any:
    # Detectron2's evaluation calls train(True) after it, to restore the mode of a
    # GeneralizedRCNNWithTTA: only the forward pass can refuse that.
    if mode is None:
        raise RuntimeError(_NO_TRAINING)
    return type(model).train(model, mode)


def _refuse_losses(model: nn.Module, inputs: object) -> None:
    if model.training:
        raise RuntimeError(_NO_TRAINING)


def _refuse_saving(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise RuntimeError(f"an optimised model cannot be saved{_REASON}")


def _refuse_loading(model: nn.Module, *arguments: object) -> None:
    raise RuntimeError(
        "an optimised model cannot load weights: load them before cascade_det.d2.optimize()"
    )
