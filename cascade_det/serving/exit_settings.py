"""The settings of the exits that the page offers, made once; all share the detector's weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.calibration.front import FrontPoint, read_front
from cascade_det.core import CascadeHead, ExitPolicy
from cascade_det.core.first_stages import first_stages
from cascade_det.errors import CascadeDetError, ConfigError
from cascade_det.standalone.detector import Detector
from cascade_det.text import printable

logger = logging.getLogger(__name__)

# From the most accurate to the fastest; exits/throughput.yaml is the cascade without exits.
PRESETS = ("cloud", "mobile")
FRONT_FILE = "front.csv"


@dataclass(frozen=True)
class ExitSetting:
    """One position of the slider.

    Attributes:
        name: in addresses, such as ``mobile``.
        title: a few words.
        summary: one line about its rules.
        cascade: the stages it runs; settings of equal depth share them.
        exits: its policy; ``None`` for no exits.
    """

    name: str
    title: str
    summary: str
    cascade: CascadeHead
    exits: ExitPolicy | None

    def apply(self, detector: Detector) -> None:
        """Make a detector use it; no other thread may detect with it meanwhile."""
        detector.roi_heads = self.cascade
        detector.set_exits(self.exits)


class ExitSettings:
    """Settings by name, from the most accurate to the fastest.

    Without a front these are: no exits; the exits of the configuration, if they are on; the rules
    that are on by default; and the presets of ``configs/exits``. With a front they are no exits,
    those of the configuration, and the points of the front. Equal ones occur once.

    Args:
        cfg: checked, of the detector.
        detector: with its weights, optimised or not.
        front: a ``front.csv`` of a calibration, or its folder; ``None`` for the presets.

    Attributes:
        initial: the name of the configuration's own setting.

    Raises:
        CascadeDetError: the front cannot be read, or has settings that the model cannot use.
    """

    def __init__(self, cfg: CfgNode, detector: Detector, front: Path | None = None) -> None:
        self._cfg, self._detector = cfg, detector
        self._full, own = detector.roi_heads, detector.roi_heads.exits
        self._learned = None if own is None else own.learned
        self._by_name: dict[str, ExitSetting] = {}
        self._arguments: list[dict[str, Any] | None] = []
        self._add("off", "no exits", config.changed(cfg, "MODEL.CASCADE.EXIT.ENABLED", False))
        self.initial = "off"
        if own is not None:
            self._add("configuration", "exits of the configuration", cfg)
            self.initial = list(self._by_name)[-1]
        if front is None:
            self._add_presets()
        else:
            self._add_front(front)

    def __iter__(self) -> Iterator[ExitSetting]:
        return iter(self._by_name.values())

    def get(self, name: str) -> ExitSetting | None:
        """The setting of this name; ``None`` if there is none."""
        return self._by_name.get(name)

    def _add(self, name: str, title: str, cfg: CfgNode) -> None:
        """Add the exits of a configuration with the stages of the model, or its first ones."""
        arguments = config.exit_arguments(cfg)
        if arguments in self._arguments:
            return
        stages = len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
        exits = None
        if arguments is not None:
            learned = self._learned if arguments["learned"] else None
            exits = ExitPolicy(**{**arguments, "learned": learned}).eval()
        cascade = next(
            (s.cascade for s in self if s.cascade.num_stages == stages), None
        ) or first_stages(self._full, stages)
        summary = config.exit_summary(cfg).removeprefix("Exits: ")
        self._arguments.append(arguments)
        self._by_name[name] = ExitSetting(name, title, summary, cascade, exits)

    def _add_presets(self) -> None:
        defaults = {key: config.get_cfg().MODEL.CASCADE.EXIT[key] for key in _DEFAULT_RULES}
        self._add("default", "default rules", config.with_exits(self._cfg, defaults))
        for name in PRESETS:
            cfg = self._cfg.clone()
            cfg.defrost()
            config.merge_config(cfg, [f"cascade_det://exits/{name}.yaml"])
            try:
                config.check_config(cfg)
                self._check_stages(cfg)
            except ConfigError as error:
                logger.info("The preset exits/%s.yaml is left out: %s", name, error)
                continue
            self._add(name, f"preset {name}", cfg)

    def _check_stages(self, cfg: CfgNode) -> None:
        """Check that the stages of a preset are the first ones of the model."""
        wanted, given = (config.cascade_arguments(c) for c in (cfg, self._cfg))
        count = len(wanted["ious"])
        if count > len(given["ious"]):
            raise ConfigError(f"it has {count} stages, and the model {len(given['ious'])}")
        for key in ("ious", "bbox_reg_weights"):
            if wanted[key] != given[key][:count]:
                raise ConfigError(
                    f"its {key.upper()} are not those of the model's first {count} stages"
                )

    def _add_front(self, path: Path) -> None:
        file = path / FRONT_FILE if path.is_dir() else path
        by_work = sorted(enumerate(read_front(file), 1), key=lambda numbered: -numbered[1].work)
        for number, point in by_work:
            if point.setting:
                try:
                    cfg = _with_setting(self._cfg, point.setting)
                    self._add(f"front{number}", _title(point), cfg)
                except (CascadeDetError, ValueError) as error:
                    raise CascadeDetError(f"{file}, line {number + 1}: {error}") from error


_DEFAULT_RULES = ("PRUNE_THRESHOLDS", "REDUNDANCY_IOU")


def _with_setting(cfg: CfgNode, setting: Mapping[str, Any]) -> CfgNode:
    cfg = config.with_exits(cfg, {})
    pairs: list[Any] = []
    for key, value in setting.items():
        pairs += [f"MODEL.CASCADE.EXIT.{key}", value]
    config.merge_config(cfg, None, pairs)
    config.check_config(cfg)
    return cfg


def _title(point: FrontPoint) -> str:
    lost = f"{printable(point.metric, longest=20)} {point.ap:.2f} ({-point.drop:+.2f})"
    chosen = ", chosen by the calibration" if point.chosen else ""
    return f"{lost}, {point.work:.0%} of the work{chosen}"
