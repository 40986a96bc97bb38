"""A configuration key with its default, the values that it takes, and its help."""

from __future__ import annotations

import itertools
import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

Condition = Callable[[object], bool]


@dataclass(frozen=True)
class Values:
    """The values that a key takes.

    Attributes:
        accepts: whether a value is one of them; never raises.
        remedy: what to give instead of any other value, as a sentence.
        standalone_only: whether Detectron2 takes other values too.
    """

    accepts: Condition
    remedy: str
    standalone_only: bool = False


ANY = Values(lambda value: True, "")  # of the type of the default


@dataclass(frozen=True)
class Key:
    """One row of the table of keys.

    Attributes:
        default: its type is the type of all values.
        help: its effect, in one sentence; "" for a key that the standalone host does not read.
        values: the accepted values.
        unit: of the value, or of each number in a list.
        type_if_set: the type of values other than ``None``, where that is the default.
        mappings: whether the items of a list may hold mappings.
    """

    default: Any
    help: str = ""
    values: Values = ANY
    unit: str = ""
    type_if_set: type | None = None
    mappings: bool = False


@dataclass(frozen=True)
class Group:
    """The keys of one node of the tree.

    Attributes:
        node: full name of the node, such as ``MODEL.RPN``; "" for the root.
        about: a few words for a heading.
        keys: by name below the node, such as ``NMS_THRESH``; in the order in which they are shown.
    """

    node: str
    about: str
    keys: dict[str, Key]


def group(node: str, about: str, **keys: Key) -> Group:
    """A :class:`Group` with its keys as keyword arguments."""
    return Group(node, about, keys)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number; a bool is not."""
    return type(value) is not bool and isinstance(value, (int, float)) and abs(value) < math.inf


def is_text(value: object) -> bool:
    """Whether a value is text that is not empty."""
    return isinstance(value, str) and bool(value)


def at_least(low: float) -> Condition:
    """A number from ``low`` on."""
    return lambda value: is_number(value) and value >= low


def above(low: float) -> Condition:
    """A number above ``low``."""
    return lambda value: is_number(value) and value > low


def within(low: float, high: float) -> Condition:
    """A number from ``low`` to ``high``, both included."""
    return lambda value: is_number(value) and low <= value <= high


def between_0_and_1(value: object) -> bool:
    """A number above 0 and below 1."""
    return is_number(value) and 0 < value < 1


def whole(condition: Condition) -> Condition:
    """An integer that meets ``condition``."""
    return lambda value: isinstance(value, int) and condition(value)


def each(condition: Condition, *, length: int | None = None, least: int = 0) -> Condition:
    """A list of items that meet ``condition``: exactly ``length`` of them, or ``least`` or more."""

    def accepts(value: object) -> bool:
        if not isinstance(value, (list, tuple)) or not all(map(condition, value)):
            return False
        return len(value) >= least if length is None else len(value) == length

    return accepts


def rising(values: Condition, *, strictly: bool) -> Condition:
    """A list that meets ``values`` and whose numbers never fall; ``strictly``: always rise."""

    def accepts(value: object) -> bool:
        if not isinstance(value, (list, tuple)) or not values(value):
            return False
        return all(a < b or (a == b and not strictly) for a, b in itertools.pairwise(value))

    return accepts


def one_of(*allowed: object, why: str = "", standalone_only: bool = False) -> Values:
    """One of the given values."""
    remedy = f"Supported: {', '.join(map(repr, allowed))}.{why and ' ' + why}"
    return Values(lambda value: value in allowed, remedy, standalone_only)


def subset_of(*allowed: str) -> Values:
    """A list of some of the given names."""
    listed = f"{', '.join(map(repr, allowed[:-1]))} and {allowed[-1]!r}"
    return Values(each(lambda item: item in allowed), f"Give a list of names from {listed}.")


COUNT = Values(whole(at_least(1)), "Give 1 or more.")
NOT_NEGATIVE = Values(at_least(0), "Give 0 or more.")
POSITIVE = Values(above(0), "Give a number above 0.")
FRACTION = Values(within(0, 1), "Give a number from 0 to 1.")
ABOVE_0_TO_1 = Values(
    lambda value: is_number(value) and 0 < value <= 1, "Give a number above 0 and up to 1."
)
FROM_0_BELOW_1 = Values(
    lambda value: is_number(value) and 0 <= value < 1, "Give a number from 0 to below 1."
)
BETWEEN_0_AND_1 = Values(between_0_and_1, "Give a number between 0 and 1.")
NAMES = Values(each(is_text), "Give a list of names, such as [a, b].")


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = 40


def shown(value: object) -> str:
    """``repr`` for a message: never fails, and is short however long the value is."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python spells no integers of many thousand digits
        return f"a very long {type(value).__name__}"
