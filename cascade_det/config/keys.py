"""A configuration as a flat table of full keys, and the difference of two."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fvcore.common.config import CfgNode


def flat(cfg: CfgNode) -> dict[str, Any]:
    """Every value under its full key, such as ``SOLVER.BASE_LR``, in the order of the tree."""
    return dict(_leaves(cfg, ""))


def changed_keys(old: CfgNode, new: CfgNode) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ, with the old and the new one, in the order of ``new``.

    A list equals a tuple of the same items, since YAML does not tell them apart. A key that only
    one configuration has counts as ``None`` in the other.
    """
    before, after = flat(old), flat(new)
    return {
        key: (before.get(key), after.get(key))
        for key in (*after, *(key for key in before if key not in after))
        if as_lists(before.get(key)) != as_lists(after.get(key))
    }


def _leaves(node: CfgNode, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def as_lists(value: Any) -> Any:
    """Tuples as lists, at every depth, as YAML has them."""
    return [as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value
