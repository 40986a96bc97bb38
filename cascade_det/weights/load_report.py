"""What became of the weights of a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from cascade_det.text import listed
from cascade_det.weights.attention import differs_in_kernel, kernels_of
from cascade_det.weights.completeness import PREDICTOR, Shapes, differing_shapes
from cascade_det.weights.files import WeightsFile

_KERNELS_SHOWN = 3


@dataclass
class LoadReport:
    """Where the weights of a file went. ``str(report)`` is for reading.

    Attributes:
        file: what was read.
        total: how many tensors the model has.
        loaded: names of the model's tensors that were set.
        resized: those of ``loaded`` that were fitted to another window of attention, by name: the
            file's shape and the model's.
        reinitialised: tensors left as initialised, by name: the file's shape and the model's.
        missing: the model's names that the file does not have.
        unused: the file's names that no detector uses, by what they are.
        unexpected: the file's other names that the model has no place for.
        ambiguous: the file's names that fit several places of the model, and were left out.
    """

    file: WeightsFile
    total: int
    loaded: list[str] = field(default_factory=list)
    resized: dict[str, Shapes] = field(default_factory=dict)
    reinitialised: dict[str, Shapes] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unused: dict[str, list[str]] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    ambiguous: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        known_here = [*self.loaded, *self.missing, *self.reinitialised]
        sections = (
            ("resized, trained with another window of attention", differing_shapes(self.resized)),
            *self._reinitialised(),
            ("not in the file, left as initialised", _by_module(self.missing, self.loaded)),
            ("no place in this model, left out", _by_module(self.unexpected, known_here)),
            ("fits several places of this model, left out", self.ambiguous),
        )
        lines = [
            f"Weights from {self.file.path} ({self.file.origin} names): "
            f"{len(self.loaded)} of the model's {self.total} tensors loaded."
        ]
        for title, entries in sections:
            if entries:
                lines += [f"  {title}:", *(f"    {entry}" for entry in entries)]
        for part, names in self.unused.items():
            lines.append(f"  left out: {part} ({len(names)} tensors)")
        if self.file.hint:
            lines.append(f"  {self.file.hint}")
        return "\n".join(lines)

    def _reinitialised(self) -> list[tuple[str, list[str]]]:
        """A title and its entries for each cause of another shape."""
        every = self.reinitialised
        kernels = {k: shapes for k, shapes in every.items() if differs_in_kernel(k, *shapes)}
        predictors = {k: shapes for k, shapes in every.items() if PREDICTOR.match(k)}
        others = {k: v for k, v in every.items() if k not in kernels and k not in predictors}
        remedy = kernels_of(self.file.weights) if kernels else []
        told = f", MODEL.EFFICIENTVIT.KERNELS '{remedy}'" if remedy else ""
        return [
            (
                "reinitialised, the convolutions of q have another kernel: to load them, give "
                f"the model the kernels of the file{told}",
                [listed(differing_shapes(kernels), _KERNELS_SHOWN, "\n    ")] if kernels else [],
            ),
            (
                "reinitialised, the shape differs (other classes, or class-agnostic?)",
                differing_shapes(predictors),
            ),
            ("reinitialised, the shape differs", differing_shapes(others)),
        ]


def _by_module(names: list[str], known: Iterable[str]) -> list[str]:
    """One line for each outermost module that ``known`` has nothing of."""
    prefixes = {prefix for name in known for prefix in _prefixes(name)}
    groups = Counter(
        next((p for p in _prefixes(name) if p not in prefixes), name) for name in names
    )
    return [
        name if count == 1 and name in names else f"{name} ({count} tensors)"
        for name, count in sorted(groups.items())
    ]


def _prefixes(name: str) -> list[str]:
    """``a.b.c`` -> ``a``, ``a.b``, ``a.b.c``."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
