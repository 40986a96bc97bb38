"""Issues of a data set: their kinds, counts and examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from reprlib import Repr

# Examples per kind: enough to see a pattern.
EXAMPLES_KEPT = 20

_short = Repr()
_short.maxstring = _short.maxother = 80


class Issues:
    """Issues by kind, in the order in which they were found.

    Attributes:
        counts: number of entries by kind.
        examples: descriptions of the first ``EXAMPLES_KEPT`` entries by kind.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, kind: str, describe: Callable[..., str], *entry: object) -> None:
        """Count one more entry; calls ``describe(*entry)`` only while examples are kept."""
        self.counts[kind] += 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < EXAMPLES_KEPT:
            examples.append(describe(*entry))

    def update(self, other: Issues) -> None:
        """Add the issues of another."""
        for kind, count in other.counts.items():
            self.counts[kind] += count
            mine = self.examples.setdefault(kind, [])
            mine += other.examples[kind][: EXAMPLES_KEPT - len(mine)]

    def copy(self) -> Issues:
        """An independent copy."""
        copied = Issues()
        copied.update(self)
        return copied

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        """One line per kind: the count and three examples."""
        return "\n".join(
            f"  {count} x {kind}: {', '.join(self.examples[kind][:3])}{', ...' * (count > 3)}"
            for kind, count in self.counts.items()
        )


def shown(value: object) -> str:
    """Any value of a json as short, printable ASCII."""
    return _short.repr(value).encode("ascii", "backslashreplace").decode()
