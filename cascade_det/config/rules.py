"""What a rule about one key is, and the conditions that rules are made of."""

from __future__ import annotations

import itertools
import math
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

from fvcore.common.config import CfgNode

Condition = Callable[[object], bool]
Check = Callable[[CfgNode], Iterator[str]]  # of several keys; yields the problems that it finds


@dataclass(frozen=True)
class Rule:
    """One key and the condition that its value has to meet.

    Attributes:
        key: full name, such as ``MODEL.ROI_HEADS.NUM_CLASSES``.
        holds: whether a value is good; never raises.
        remedy: what to do about a value that is not, as a sentence.
    """

    key: str
    holds: Condition
    remedy: str


def value_of(cfg: CfgNode, key: str) -> Any:
    """The value under a full key."""
    node: Any = cfg
    for part in key.split("."):
        node = node[part]
    return node


def only(key: str, *allowed: object, why: str = "") -> Rule:
    """A rule: the value is one of ``allowed``."""
    listed = ", ".join(map(repr, allowed))
    return Rule(key, lambda value: value in allowed, f"Supported: {listed}.{why and ' ' + why}")


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = 40


def shown(value: object) -> str:
    """``repr`` for a message: one that never fails, and is short however long the value is."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python spells no integers of many thousand digits
        return f"a very long {type(value).__name__}"


def is_number(value: object) -> TypeGuard[float]:
    """A finite number, which a bool is not."""
    return type(value) is not bool and isinstance(value, (int, float)) and abs(value) < math.inf


def at_least(low: float) -> Condition:
    """A number from ``low`` on."""
    return lambda value: is_number(value) and value >= low


def above(low: float) -> Condition:
    """A number above ``low``."""
    return lambda value: is_number(value) and value > low


def within(low: float, high: float) -> Condition:
    """A number from ``low`` to ``high``, both included."""
    return lambda value: is_number(value) and low <= value <= high


def whole(condition: Condition) -> Condition:
    """An integer that meets ``condition``."""
    return lambda value: isinstance(value, int) and condition(value)


def is_text(value: object) -> bool:
    """Text that is not empty."""
    return isinstance(value, str) and bool(value)


def each(condition: Condition, *, length: int | None = None, least: int = 0) -> Condition:
    """A list of things that meet ``condition``: ``length`` of them, or ``least`` and more."""

    def holds(value: object) -> bool:
        if not isinstance(value, (list, tuple)) or not all(map(condition, value)):
            return False
        return len(value) >= least if length is None else len(value) == length

    return holds


def rising(values: Condition, *, strictly: bool) -> Condition:
    """A list that meets ``values``, numbers none of which is below (or equal to) the last."""

    def holds(value: object) -> bool:
        if not isinstance(value, (list, tuple)) or not values(value):
            return False
        return all(a < b or (a == b and not strictly) for a, b in itertools.pairwise(value))

    return holds
