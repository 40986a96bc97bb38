"""Random crops with Detectron2's meaning (``INPUT.CROP``)."""

from __future__ import annotations

import numpy as np

CROP_TYPES = ("relative_range", "relative", "absolute", "absolute_range")


class RandomCrop:
    """Draws a part of an image, as Detectron2's augmentation of that name.

    Args:
        kind: ``"relative"``, ``size`` (height, width) is a share of the image;
            ``"relative_range"``, the shares are drawn from ``size`` to 1; ``"absolute"``, in
            pixels; ``"absolute_range"``, both sides are drawn between the two values.
        size: two numbers.
    """

    def __init__(self, kind: str, size: tuple[float, float]) -> None:
        self.kind = kind
        self.size = size

    def __call__(
        self, height: int, width: int, generator: np.random.Generator
    ) -> tuple[int, int, int, int]:
        """Top, left, height and width of a part of an image of ``height`` and ``width``."""
        part_height, part_width = self._draw_size(height, width, generator)
        top = int(generator.integers(height - part_height + 1))
        left = int(generator.integers(width - part_width + 1))
        return top, left, part_height, part_width

    def _draw_size(
        self, height: int, width: int, generator: np.random.Generator
    ) -> tuple[int, int]:
        first, second = self.size
        if self.kind == "absolute":
            return min(int(first), height), min(int(second), width)
        if self.kind == "absolute_range":
            low, high = int(first), int(second)
            drawn = (
                int(generator.integers(min(side, low), min(side, high), endpoint=True))
                for side in (height, width)
            )
            return next(drawn), next(drawn)
        shares = np.array(self.size, np.float64)
        if self.kind == "relative_range":
            least = np.array(self.size, np.float32)  # as in Detectron2, for the same pixels
            shares = least + generator.random(2) * (1 - least)
        # Detectron2 leaves nothing of a tiny image at a tiny share.
        return max(int(height * shares[0] + 0.5), 1), max(int(width * shares[1] + 0.5), 1)
