"""Checks of a whole configuration.

First each key on its own, then keys against each other. A check across keys stops at a key that is
wrong by itself, so it never sees invalid values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from typing import Any

from fvcore.common.config import CfgNode

from cascade_det.config.backbone_arguments import BACKBONES, TRUNKS
from cascade_det.config.cascade_checks import HEAD_CHECKS, Check
from cascade_det.config.key import Values, one_of, shown
from cascade_det.config.model_checks import BACKBONE_CHECKS, MODEL_CHECKS
from cascade_det.config.run_checks import RUN_CHECKS
from cascade_det.config.segmenter_arguments import is_segmenter
from cascade_det.config.segmenter_checks import (
    SEGMENTER_CHECKS,
    check_fast,
    check_levels,
    check_not_fast,
    check_unread,
)
from cascade_det.config.tree import BACKBONE_NODES, KEYS, changed_keys, get_cfg, value_of
from cascade_det.errors import ConfigError

_HEADS = (
    "MODEL.ROI_HEADS.",
    "MODEL.ROI_BOX_HEAD.",
    "MODEL.ROI_BOX_CASCADE_HEAD.",
    "MODEL.CASCADE.",
)
# Segmenters read none of these.
_OF_DETECTORS = (*_HEADS, "MODEL.RPN.", "MODEL.PROPOSAL_GENERATOR.", "MODEL.ANCHOR_GENERATOR.")
_BACKBONES = tuple(f"MODEL.{node}." for node in BACKBONE_NODES)
_SEMANTIC_HEAD = ("MODEL.SEM_SEG_HEAD.", "MODEL.CASCADE_DECODER.", "MODEL.DUAL_SCALE.")
# Values that keys have in models of one kind.
_DETECTOR = {
    "MODEL.BACKBONE.NAME": one_of(*BACKBONES),
    "MODEL.DUAL_SCALE.MODE": one_of("off", why="Two scales are for segmenters."),
}
_SEGMENTER = {"MODEL.SEM_SEG_HEAD.NAME": one_of("CascadeSemSegHead")}
_HEAD_OF_DETECTRON2 = {
    "MODEL.DUAL_SCALE.MODE": one_of("off", why="Two scales need the standalone host.")
}
_RUN = (
    "CASCADE.",
    "SOLVER.",
    "DATASETS.",
    "DATALOADER.",
    "INPUT.",
    "TEST.",
    "MODEL.DEVICE",
    "OUTPUT_DIR",
    "FLOAT32_PRECISION",
)


def check_config(cfg: CfgNode) -> None:
    """Check that the standalone host can build, train and run what ``cfg`` describes.

    Args:
        cfg: a configuration with both nodes of ours; it is not changed.

    Raises:
        ConfigError: lists every problem with key, value and remedy.
    """
    if is_segmenter(cfg):
        read = [name for name in KEYS if not name.startswith(_OF_DETECTORS)]
        _check(cfg, read, (*SEGMENTER_CHECKS, check_fast, *_run_checks(cfg)), _SEGMENTER)
    else:
        _check(cfg, list(KEYS), (*MODEL_CHECKS, *HEAD_CHECKS, *_run_checks(cfg)), _DETECTOR)


def check_segmenter(cfg: CfgNode) -> None:
    """Check what our semantic head reads, in any model of Detectron2.

    In a ``SemanticSegmentor`` with a backbone that we know, also the maps of that.

    Args:
        cfg: a configuration with ``MODEL.CASCADE_DECODER``; it is not changed.

    Raises:
        ConfigError: as ``check_config``.
    """
    has_maps = is_segmenter(cfg) and cfg.MODEL.BACKBONE.NAME in (*BACKBONES, *TRUNKS)
    checks = SEGMENTER_CHECKS if has_maps else (check_levels,)
    _check(cfg, _in_both_hosts(_SEMANTIC_HEAD), checks, _HEAD_OF_DETECTRON2)


def check_heads(cfg: CfgNode) -> None:
    """Check what our ROI heads read, in any model of Detectron2.

    Args:
        cfg: a configuration with ``MODEL.CASCADE``; it is not changed.

    Raises:
        ConfigError: as ``check_config``.
    """
    _check(cfg, _in_both_hosts(_HEADS), HEAD_CHECKS)


def check_backbone(cfg: CfgNode) -> None:
    """Check the nodes of our own backbones, in any model of Detectron2.

    Args:
        cfg: a configuration with these nodes and one of our backbones; it is not changed.

    Raises:
        ConfigError: as ``check_config``.
    """
    without_pyramid = cfg.MODEL.BACKBONE.NAME in TRUNKS
    _check(cfg, _in_both_hosts(_BACKBONES), () if without_pyramid else BACKBONE_CHECKS)


def check_unread_decoder(cfg: CfgNode) -> None:
    """Check that the decoder's keys have their defaults where the semantic head reads none.

    Raises:
        ConfigError: names the changed keys.
    """
    ours = ("MODEL.CASCADE_DECODER.", "MODEL.DUAL_SCALE.")
    if asked := [key for key in changed_keys(get_cfg(), cfg) if key.startswith(ours)]:
        raise ConfigError(
            f"{', '.join(asked)}: set, but MODEL.SEM_SEG_HEAD.NAME is "
            f"{shown(cfg.MODEL.SEM_SEG_HEAD.NAME)}, which does not read them. Set it to "
            "CascadeSemSegHead, or leave the keys at their defaults."
        )


def check_unread_cascade(cfg: CfgNode) -> None:
    """Check that ``MODEL.CASCADE`` has its defaults where the ROI heads do not read it.

    Keys that change how something is computed but not what, and thresholds of exits that are off,
    may have any value.

    Raises:
        ConfigError: names the changed keys.
    """
    changed = changed_keys(get_cfg(), cfg)
    idle = ["MODEL.CASCADE.POOLER_KERNEL", "MODEL.CASCADE.FAST."]
    idle += [] if cfg.MODEL.CASCADE.EXIT.ENABLED else ["MODEL.CASCADE.EXIT."]
    asked = [
        key
        for key in changed
        if key.startswith("MODEL.CASCADE.") and not key.startswith(tuple(idle))
    ]
    if asked:
        raise ConfigError(
            f"{', '.join(asked)}: set, but MODEL.ROI_HEADS.NAME is "
            f"{shown(cfg.MODEL.ROI_HEADS.NAME)}, which does not read them. Set it to "
            "EarlyExitCascadeROIHeads, or leave the keys at their defaults."
        )


def check_run(cfg: CfgNode) -> None:
    """Check data, solver and evaluation of a run, with any model of Detectron2.

    Args:
        cfg: a configuration with ``CASCADE``; it is not changed.

    Raises:
        ConfigError: as ``check_config``.
    """
    further = (check_not_fast,) if is_segmenter(cfg) else ()
    _check(cfg, _in_both_hosts(_RUN), (*_run_checks(cfg), *further))


def _run_checks(cfg: CfgNode) -> tuple[Check, ...]:
    return (*RUN_CHECKS, check_unread) if is_segmenter(cfg) else RUN_CHECKS


def _in_both_hosts(prefixes: tuple[str, ...]) -> list[str]:
    return [
        name
        for name, key in KEYS.items()
        if name.startswith(prefixes) and not key.values.standalone_only
    ]


def _check(
    cfg: CfgNode,
    names: list[str],
    checks: tuple[Check, ...],
    narrower: Mapping[str, Values] | None = None,
) -> None:
    allowed = {name: KEYS[name].values for name in names} | dict(narrower or {})
    values = {name: value_of(cfg, name) for name in names}
    wrong = {name: value for name, value in values.items() if not allowed[name].accepts(value)}
    problems = [
        f"{name} is {shown(value)}. {allowed[name].remedy}" for name, value in wrong.items()
    ]
    for check in checks:
        with contextlib.suppress(_WrongKey):
            problems.extend(check(_View(cfg, wrong)))
    if problems:
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        listed = "\n  - ".join(problems)
        raise ConfigError(f"The configuration has {count}:\n  - {listed}")


class _WrongKey(Exception):
    """A check has read a key that is wrong by itself."""


class _View:
    """A configuration that can be read, but for keys that are wrong by themselves."""

    def __init__(self, node: CfgNode, wrong: Collection[str], prefix: str = "") -> None:
        self._node, self._wrong, self._prefix = node, wrong, prefix

    def __getitem__(self, name: str) -> Any:
        full_name = self._prefix + name
        if full_name in self._wrong:
            raise _WrongKey(full_name)
        value = self._node[name]
        return _View(value, self._wrong, f"{full_name}.") if isinstance(value, CfgNode) else value

    __getattr__ = __getitem__
