"""The shipped configurations by name, as in ``detectron2.model_zoo``.

In a Detectron2 script, after ``add_cascade_config(cfg)``::

    cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/cascade_rcnn_R_50_FPN_1x.yaml"))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fvcore.common.config import CfgNode

from cascade_det.config import load_config
from cascade_det.config.shipped import config_path, shipped_names

__all__ = ["get_config", "get_config_file", "list_configs"]


def get_config_file(name: str) -> str:
    """The path of a shipped configuration.

    Args:
        name: such as "COCO-Detection/cascade_rcnn_R_50_FPN_1x.yaml"; see ``list_configs``. A
            ``.py`` file, such as "lazy/cascade_rcnn_R_50_FPN_1x_early_exit.py", is for the
            ``LazyConfig.load`` of Detectron2.

    Raises:
        ConfigError: there is no such configuration.
    """
    return str(config_path(name))


def get_config(name: str, opts: Sequence[Any] = ()) -> CfgNode:
    """A shipped configuration for the standalone host, with options on top.

    Args:
        name: of a YAML file, see ``list_configs``.
        opts: ``KEY, VALUE`` pairs in one flat sequence.

    Returns:
        The configuration, not frozen; see ``cascade_det.config.check_config``.

    Raises:
        ConfigError: there is no such configuration, it is a LazyConfig, or an option has a wrong
            key or value.
    """
    return load_config(get_config_file(name), opts)


def list_configs() -> list[str]:
    """The names of all shipped YAML files."""
    return [name for name in shipped_names() if name.endswith(".yaml")]
