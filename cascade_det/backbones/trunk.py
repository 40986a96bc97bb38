"""What a feature extractor is to a pyramid, a host and the optimisation for inference."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from torch import Tensor, nn

# A level is the base-2 logarithm of its stride.
LEVELS = {f"res{level}": level for level in range(2, 7)}


class Trunk(Protocol):
    """A feature extractor, an ``nn.Module``.

    Attributes:
        out_features: names of its maps, keys of ``LEVELS``, finest first.
        channels: channels of the maps, by name.
    """

    out_features: tuple[str, ...]
    channels: dict[str, int]

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Images ``[N, 3, H, W]`` to maps by name, of ``ceil(H / stride)`` rows."""

    def stem_and_stages(self) -> tuple[nn.Module, list[nn.Module]]:
        """All its layers: the stem, which takes the images, and the rest in order of use."""


def check_features(out_features: Sequence[str], known: Collection[str]) -> tuple[str, ...]:
    """``out_features`` as a tuple.

    Raises:
        ValueError: there are none, or some are unknown.
    """
    unknown = set(out_features) - set(known)
    if unknown or not out_features:
        raise ValueError(f"unknown features {sorted(unknown)}; known: {', '.join(known)}")
    return tuple(out_features)
