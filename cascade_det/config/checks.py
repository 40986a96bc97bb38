"""Checks of a whole configuration for the standalone host.

First each key on its own (``supported``, ``ranges``), then keys against each other. A check
across keys is left out where one of its keys is wrong by itself, and never meets odd values.
"""

from __future__ import annotations

from fvcore.common.config import CfgNode

from cascade_det.config.model_checks import MODEL_CHECKS
from cascade_det.config.ranges import RANGES
from cascade_det.config.rules import shown, value_of
from cascade_det.config.run_checks import RUN_CHECKS
from cascade_det.config.supported import SUPPORTED
from cascade_det.errors import ConfigError


def check_config(cfg: CfgNode) -> None:
    """Check that the standalone host can build, train and run what ``cfg`` describes.

    Args:
        cfg: a configuration with both nodes of ours; it is not changed.

    Raises:
        ConfigError: lists every problem that was found, each with key, value and remedy.
    """
    problems: list[str] = []
    wrong: set[str] = set()
    for rule in (*SUPPORTED, *RANGES):
        value = value_of(cfg, rule.key)
        if not rule.holds(value):
            wrong.add(rule.key)
            problems.append(f"{rule.key} is {shown(value)}. {rule.remedy}")
    for check, keys in {**MODEL_CHECKS, **RUN_CHECKS}.items():
        if wrong.isdisjoint(keys):
            problems += check(cfg)
    if problems:
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        listed = "\n  - ".join(problems)
        raise ConfigError(f"The configuration has {count}:\n  - {listed}")
