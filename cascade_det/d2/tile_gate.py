"""The tile gate of a model of Detectron2: its finest map in tiles, where its exits ask for it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from cascade_det.d2.backbones import FPNBackbone
from cascade_det.d2.fast_parts import LeanRPN
from cascade_det.d2.heads_call import current_call
from cascade_det.layers.rpn_head import TileScorer
from cascade_det.layers.tiles import TILE, FeatureMap, TiledMap

logger = logging.getLogger(__name__)

NOT_OPTIMISED = (
    "the model is not optimised by cascade_det.d2.optimize() or MODEL.CASCADE.FAST.ENABLED"
)
# Of a model with a gate.
_IN_THIS_CALL = "tiles need torch.no_grad(), and neither autocast nor a trace"


def gate_tiles(model: Any) -> str | None:
    """Compute the finest map in tiles whenever the present exits of the heads ask for it.

    Args:
        model: optimised, with our heads; nothing but these and its RPN reads its maps.

    Returns:
        Why the whole map is computed all the same; ``None`` if tiles are.
    """
    heads, rpn = model.roi_heads, model.proposal_generator
    if lacking := list(_lacking(model.backbone, rpn, heads)):
        return f"tiles need {'; '.join(lacking)}"
    # Bound to the heads, since their exits may be replaced, and copies have heads of their own.
    model.backbone.register_forward_pre_hook(partial(_ask_for_tiles, heads), with_kwargs=True)
    rpn.tile_threshold = partial(tile_threshold, heads)
    rpn.tile_scorer = partial(_tile_scorer, heads)
    return None


def tile_threshold(heads: Any) -> float:
    """The threshold of the present exits of our heads; 0 computes the whole map."""
    if heads.exits is None or current_call().whole_maps:
        return 0.0
    return float(heads.exits.tile_threshold)


def _tile_scorer(heads: Any) -> TileScorer | None:
    return None if heads.exits is None else heads.exits.tile_scorer


def say_why_whole(heads: Any, reason: str | None) -> list[str]:
    """Say why an optimised model computes the whole map, if its exits ask for tiles.

    Otherwise the reason is kept for ``warn_of_whole_map``.

    Args:
        heads: ours.
        reason: from ``gate_tiles``.
    """
    if reason is None or not tile_threshold(heads):
        heads.whole_map_reason = reason or _IN_THIS_CALL
        return []
    heads.whole_map_reason = None
    return [_sentence(heads, reason)]


def warn_of_whole_map(heads: Any, finest: FeatureMap) -> None:
    """Log, once, that the exits ask for tiles of a map that was computed as a whole."""
    reason = heads.whole_map_reason
    if reason is None or isinstance(finest, TiledMap) or not tile_threshold(heads):
        return
    heads.whole_map_reason = None
    logger.warning(_sentence(heads, reason))


def _sentence(heads: Any, reason: str) -> str:
    return (
        f"MODEL.CASCADE.EXIT.TILE_THRESHOLD is {tile_threshold(heads):g}, but the finest map is "
        f"computed as a whole: {reason}."
    )


def _ask_for_tiles(
    heads: Any, pyramid: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return inputs, {**options, "in_tiles": tile_threshold(heads) > 0}


def _lacking(pyramid: Any, rpn: Any, heads: Any) -> Iterator[str]:
    """What tiles need and these parts have not."""
    if not isinstance(pyramid, FPNBackbone):
        yield "a backbone with an FPN"
        return
    names = tuple(pyramid.strides)
    if pyramid.size_divisibility % (TILE * pyramid.strides[names[0]]):
        yield "four levels or more in MODEL.FPN.IN_FEATURES"  # images are padded to whole tiles
    if not pyramid.takes_tiles:
        yield "no norm over whole maps in MODEL.FPN.NORM"
    if not isinstance(rpn, LeanRPN):
        yield "an RPN"
    else:
        if tuple(rpn.in_features[:2]) != names[:2]:
            yield f"{' and '.join(names[:2])} first in MODEL.RPN.IN_FEATURES"
        if not rpn.rpn_head.takes_tiles:
            yield "one convolution in MODEL.RPN.CONV_DIMS"
    if heads.box_in_features[0] != names[0]:
        yield f"{names[0]} first in MODEL.ROI_HEADS.IN_FEATURES"
