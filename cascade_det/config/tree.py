"""The table of all keys, and configurations as trees of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from fvcore.common.config import CfgNode

from cascade_det.config.cascade_keys import CASCADE_GROUPS
from cascade_det.config.key import Key
from cascade_det.config.model_keys import BOX_HEAD, CASCADE, MODEL_GROUPS
from cascade_det.config.run_keys import RUN_GROUPS, VERSION
from cascade_det.config.unread_keys import UNREAD_KEYS

# Below MODEL; Detectron2 has none of these.
BACKBONE_NODES = ("EFFICIENTVIT", "HATNET", "HIERVIT", "PVTV2", "MAXVIT")
_MODEL_NODES = ("CASCADE", *BACKBONE_NODES, "CASCADE_DECODER", "DUAL_SCALE")
GROUPS = (VERSION, *MODEL_GROUPS, CASCADE, BOX_HEAD, *CASCADE_GROUPS, *RUN_GROUPS)
# By full name, such as SOLVER.BASE_LR.
KEYS: dict[str, Key] = {
    f"{group.node}.{name}".lstrip("."): key for group in GROUPS for name, key in group.keys.items()
} | UNREAD_KEYS


def get_cfg() -> CfgNode:
    """A fresh configuration with all default values, ours included.

    The defaults are Detectron2's and describe its C4 model; ``configs/`` holds the configurations
    of cascades.
    """
    return _with_defaults(CfgNode(), "")


def add_cascade_config(cfg: CfgNode) -> None:
    """Add ``CASCADE`` and our nodes below ``MODEL``, in place.

    Works on any yacs configuration, Detectron2's included: new nodes have the type of ``cfg``,
    which its ``merge_from_file`` requires. Existing keys keep their values.

    Args:
        cfg: a configuration with a ``MODEL`` node, not frozen.
    """
    add_model_nodes(cfg)
    _with_defaults(cfg, "CASCADE.")


def add_model_nodes(cfg: CfgNode) -> None:
    """Add only what a model needs, below ``MODEL``; see :func:`add_cascade_config`."""
    for node in _MODEL_NODES:
        _with_defaults(cfg, f"MODEL.{node}.")


def _with_defaults(cfg: CfgNode, prefix: str) -> CfgNode:
    for full_name, key in KEYS.items():
        if not full_name.startswith(prefix):
            continue
        *parents, name = full_name.split(".")
        node = cfg
        for parent in parents:
            if parent not in node:
                setattr(node, parent, type(cfg)())
            node = node[parent]
        if name not in node:
            setattr(node, name, copy.deepcopy(key.default))
    return cfg


def value_of(cfg: CfgNode, key: str) -> Any:
    """The value under a full key."""
    node: Any = cfg
    for part in key.split("."):
        node = node[part]
    return node


def flat(cfg: CfgNode) -> dict[str, Any]:
    """Every value under its full key, such as ``SOLVER.BASE_LR``, in the order of the tree."""
    return dict(_leaves(cfg, ""))


def _leaves(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def changed(cfg: CfgNode, *options: Any) -> CfgNode:
    """A copy of a configuration with other values: key, value, key, value, ..."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(list(options))
    return cfg


def changed_keys(old: CfgNode, new: CfgNode) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ, with the old and the new value, in the order of ``new``.

    A list equals a tuple of the same items, since YAML does not tell them apart. A key that only
    one configuration has counts as ``None`` in the other.
    """
    before, after = flat(old), flat(new)
    return {
        key: (before.get(key), after.get(key))
        for key in (*after, *(key for key in before if key not in after))
        if as_lists(before.get(key)) != as_lists(after.get(key))
    }


def settings(cfg: CfgNode) -> dict[str, tuple[Any, Any]]:
    """The keys of a run that differ from the defaults: these, and the values of the run."""
    return {key: values for key, values in changed_keys(get_cfg(), cfg).items() if key in KEYS}


def as_lists(value: Any) -> Any:
    """Tuples as lists, at every depth, as YAML has them."""
    if isinstance(value, dict):
        return {key: as_lists(item) for key, item in value.items()}
    return [as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value
