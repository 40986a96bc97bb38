"""The exits of a configuration as one line for a log, with a value for every stage or gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fvcore.common.config import CfgNode

from cascade_det.config.model_arguments import exit_arguments
from cascade_det.config.segmenter_arguments import is_segmenter, map_exit_arguments

# Rules with one value per stage or gate: key, effect, and which value means never.
_BACKGROUND: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    ("prune_thresholds", "background below {}", lambda value: value <= 0),
    (
        "prune_margins",
        "background more than {} below the score of rank {best}",
        lambda value: value >= 1,
    ),
    ("pruner_thresholds", "background by the pruner below {}", lambda value: value <= 0),
)


def exit_summary(cfg: CfgNode) -> str:
    """One line about the exits of a checked configuration.

    It has the stages and their IoUs, every active rule with a value for each stage (or gate, the
    one before stage 0 first), and the loss that calibration expects; ``Exits: off`` without exits.
    Of a segmenter it has what leaves, and the confidence for each level.
    """
    if is_segmenter(cfg):
        return _of_maps(cfg)
    exits = exit_arguments(cfg)
    if exits is None:
        return "Exits: off"
    ious = cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS
    stages = f"{len(ious)} stages, IoU {_listed(ious)}"
    rules = [*_dropping(exits), *_keeping(exits)] or ["no rule is on"]
    return f"Exits: {'; '.join([stages, *rules, *_calibration(cfg, exits)])}"


def _of_maps(cfg: CfgNode) -> str:
    if not cfg.MODEL.CASCADE_DECODER.EXIT.ENABLED:
        return "Exits: off"
    exits = map_exit_arguments(cfg)
    what = f"patches of {exits['patch']} pixels" if exits["kind"] == "patch" else "images"
    thresholds = _listed(exits["thresholds"], lambda value: value > 1)
    return f"Exits: {what}, confident from {exits['confidence']} {thresholds}"


def _dropping(exits: Mapping[str, Any]) -> Iterator[str]:
    if exits["tile_threshold"] >= 1:
        yield "no proposals from the finest map"
    elif exits["tile_threshold"] > 0:
        score = "a learned score" if "tile_head" in exits["learned"] else "an objectness"
        yield f"the finest map in tiles of {score} from {exits['tile_threshold']:g}"
    if exits["proposal_threshold"] > 0:
        yield f"proposals of an objectness below {exits['proposal_threshold']:g}"
    for key, text, is_never in _BACKGROUND:
        if not all(map(is_never, exits[key])):
            values = _listed(exits[key], is_never)
            yield text.format(values, best=exits["prune_best"])
    if exits["redundancy_iou"] is not None:
        yield f"redundant from IoU {exits['redundancy_iou']:g}"


def _keeping(exits: Mapping[str, Any]) -> Iterator[str]:
    confidence, localisation = exits["confidence"], exits["localisation"]

    def is_never(value: float) -> bool:
        return confidence != "agreement" and value > 1

    if not all(map(is_never, exits["thresholds"])):
        yield f"confident from {confidence} {_listed(exits['thresholds'], is_never)}" + (
            f" and {localisation} {_listed(exits['localisation_thresholds'])}"
            if localisation != "none"
            else ""
        )
    if any(exits["region_budget"]):
        limits = _listed(exits["region_budget"], lambda value: value == 0, never="any number")
        yield f"at most {limits} of an image's regions in a stage"
    if exits["time_budget_ms"] > 0:
        per = "image" if exits["time_budget_per_image"] else "batch"
        yield f"at most {exits['time_budget_ms']:g} ms per {per}"
    if exits["gates_off"]:
        yield f"off at gate {', '.join(map(str, exits['gates_off']))}"


def _calibration(cfg: CfgNode, exits: Mapping[str, Any]) -> Iterator[str]:
    node = cfg.MODEL.CASCADE.EXIT
    scales, shifts = exits["score_scales"], exits["score_shifts"]
    if any(scale != 1 for scale in scales) or any(shifts):
        yield f"scores scaled by {_listed(scales)} and shifted by {_listed(shifts)}"
    if exits["learned"]:
        yield f"learned {', '.join(exits['learned'])}"
    if node.EXPECTED_LOSS >= 0:
        yield f"expected loss {node.EXPECTED_LOSS:g} ± {node.EXPECTED_LOSS_DEVIATION:g}"


def _listed(
    values: Sequence[float],
    is_never: Callable[[float], bool] = lambda value: False,
    never: str = "never",
) -> str:
    return ", ".join(never if is_never(value) else f"{value:g}" for value in values)
