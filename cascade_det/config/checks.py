"""Checks of a whole configuration.

First each key on its own (``supported``, ``ranges``), then keys against each other. A check
across keys is left out where one of its keys is wrong by itself, and never meets odd values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from fvcore.common.config import CfgNode

from cascade_det.config.defaults import get_cfg
from cascade_det.config.keys import changed_keys
from cascade_det.config.model_checks import HEAD_CHECKS, MODEL_CHECKS
from cascade_det.config.ranges import RANGES
from cascade_det.config.rules import Check, Rule, shown, value_of
from cascade_det.config.run_checks import RUN_CHECKS
from cascade_det.config.supported import DETECTRON2_ALONE, SUPPORTED
from cascade_det.errors import ConfigError

Checks = dict[Check, tuple[str, ...]]

# Detectron2 finds these in its registries, and leaves what they may be to whoever wrote them.
_REGISTERED = ("MODEL.ROI_HEADS.NAME", "MODEL.ROI_BOX_HEAD.NAME", "MODEL.ROI_BOX_HEAD.NORM")
# What Detectron2's cascades do not look at.
_NOT_OF_A_CASCADE = ("MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES",)
_HEADS = (
    "MODEL.ROI_HEADS.",
    "MODEL.ROI_BOX_HEAD.",
    "MODEL.ROI_BOX_CASCADE_HEAD.",
    "MODEL.CASCADE.",
)
_RUN = (
    *("CASCADE.", "SOLVER.", "DATASETS.", "DATALOADER.", "INPUT.", "TEST."),
    *("MODEL.DEVICE", "OUTPUT_DIR", "FLOAT32_PRECISION"),
)


def check_config(cfg: CfgNode) -> None:
    """Check that the standalone host can build, train and run what ``cfg`` describes.

    Args:
        cfg: a configuration with both nodes of ours; it is not changed.

    Raises:
        ConfigError: lists every problem that was found, each with key, value and remedy.
    """
    _check(cfg, (*SUPPORTED, *RANGES), {**MODEL_CHECKS, **HEAD_CHECKS, **RUN_CHECKS})


def check_heads(cfg: CfgNode) -> None:
    """Check what our ROI heads need to know, whatever model of Detectron2 they are part of.

    Args:
        cfg: a configuration with ``MODEL.CASCADE``; it is not changed.

    Raises:
        ConfigError: as ``check_config``.
    """
    _check(cfg, _rules(_HEADS, without=(*_REGISTERED, *_NOT_OF_A_CASCADE)), HEAD_CHECKS)


def check_unread_cascade(cfg: CfgNode) -> None:
    """Check that nothing is asked of ``MODEL.CASCADE`` where the ROI heads do not read it.

    What says how something is computed, not what, and thresholds of exits that are off, may stay.

    Raises:
        ConfigError: names the keys that are off their defaults.
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
    """Check data, solver and evaluation of a run, whatever model it trains in Detectron2.

    Args:
        cfg: a configuration with ``CASCADE``; it is not changed.

    Raises:
        ConfigError: as ``check_config``.
    """
    _check(cfg, _rules(_RUN, without=DETECTRON2_ALONE), RUN_CHECKS)


def _rules(prefixes: tuple[str, ...], *, without: Collection[str]) -> list[Rule]:
    rules = (*SUPPORTED, *RANGES)
    return [rule for rule in rules if rule.key.startswith(prefixes) and rule.key not in without]


def _check(cfg: CfgNode, rules: Iterable[Rule], checks: Checks) -> None:
    problems: list[str] = []
    wrong: set[str] = set()
    for rule in rules:
        value = value_of(cfg, rule.key)
        if not rule.holds(value):
            wrong.add(rule.key)
            problems.append(f"{rule.key} is {shown(value)}. {rule.remedy}")
    for check, keys in checks.items():
        if wrong.isdisjoint(keys):
            problems += check(cfg)
    if problems:
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        listed = "\n  - ".join(problems)
        raise ConfigError(f"The configuration has {count}:\n  - {listed}")
