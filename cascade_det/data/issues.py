"""What is wrong with a data set: kinds of problem, how often, and examples to look for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from reprlib import Repr

# As many examples of a kind are kept: enough to see a pattern, however many entries have it.
EXAMPLES_KEPT = 20

_short = Repr()
_short.maxstring = _short.maxother = 80


class Issues:
    """Kinds of problem in the order in which they were met.

    Attributes:
        counts: how many entries have each kind.
        examples: the first ``EXAMPLES_KEPT`` of them, as a user can find them.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, kind: str, describe: Callable[..., str], *entry: object) -> None:
        """Count one more entry; ``describe(*entry)`` is called only while examples are wanted."""
        self.counts[kind] += 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < EXAMPLES_KEPT:
            examples.append(describe(*entry))

    def update(self, other: Issues) -> None:
        """Count what others have found as well."""
        for kind, count in other.counts.items():
            self.counts[kind] += count
            mine = self.examples.setdefault(kind, [])
            mine += other.examples[kind][: EXAMPLES_KEPT - len(mine)]

    def copy(self) -> Issues:
        """One that can be added to while this one stays as it is."""
        copied = Issues()
        copied.update(self)
        return copied

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        """One line per kind: how many, and three of them."""
        return "\n".join(
            f"  {count} x {kind}: {', '.join(self.examples[kind][:3])}{', ...' * (count > 3)}"
            for kind, count in self.counts.items()
        )


def shown(value: object) -> str:
    """Any value of a json, in a few words: never long, and printable everywhere."""
    return _short.repr(value).encode("ascii", "backslashreplace").decode()
