"""What a segmenter returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


class EncodedImages(NamedTuple):
    """A batch after the encoder.

    Attributes:
        maps: ``[N, C_l, H_l, W_l]``, coarsest first.
        size: to which logits are resized: sides of the finest map times its stride.
        image_sizes: of each image, without its padding.
    """

    maps: list[Tensor]
    size: tuple[int, int]
    image_sizes: list[tuple[int, int]]


@dataclass
class SegmenterStats:
    """How a batch was computed.

    Attributes:
        milliseconds: of every part, if it was timed.
        left: for each level, images or patches by the reason why they left after it:
            ``confident``, or ``completed`` after the last one.
    """

    milliseconds: dict[str, float] = field(default_factory=dict)
    left: list[Mapping[str, int]] = field(default_factory=list)


@dataclass
class SegmenterOutput:
    """The scores of a batch.

    Attributes:
        sem_seg: float32 logits ``[K, height, width]`` of each image.
        stats: how they were computed.
        levels: if requested, for each level the classes int64 ``[height, width]`` of each image if
            the whole decoder stopped after it; else ``None``.
    """

    sem_seg: list[Tensor]
    stats: SegmenterStats
    levels: list[list[Tensor]] | None = None
