"""Logs how precise a calibration on the given images can be, before any work begins."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cascade_det.calibration.image_matching import ImageMatcher
from cascade_det.calibration.target import Target
from cascade_det.text import printable

logger = logging.getLogger(__name__)

# With fewer images, the log line is a warning.
ENOUGH_IMAGES = 200
CONFIDENCE = 0.95


@dataclass(frozen=True)
class SampleSize:
    """The numbers of images and objects in the two halves.

    Attributes:
        choosing: images that exits are chosen on.
        reporting: images that they are judged by.
        objects: objects in the latter by the name of their class, of classes that have any.
    """

    choosing: int
    reporting: int
    objects: dict[str, int]

    @classmethod
    def of(
        cls,
        image_ids: Sequence[int],
        halves: tuple[Sequence[int], Sequence[int]],
        matcher: ImageMatcher,
        class_names: Sequence[str],
    ) -> SampleSize:
        """Count images and objects.

        Args:
            image_ids: all images.
            halves: indices into them, see ``split_images``.
            matcher: of the ground truth.
            class_names: of the classes ``0..K-1``.
        """
        choosing, reporting = halves
        classes = [matcher.objects_of(image_ids[index])[1] for index in reporting]
        counts = np.bincount(np.concatenate(classes), minlength=len(class_names)).tolist()
        named = zip(class_names, counts, strict=True)
        return cls(len(choosing), len(reporting), {name: n for name, n in named if n})

    @property
    def rarest(self) -> str:
        """The class with the fewest objects to judge by."""
        return min(self.objects, key=lambda name: self.objects[name])

    @property
    def step(self) -> float:
        """The most percent points of AP that one object of the rarest class can change.

        The recall of its class changes by one over the number of objects, and AP is a mean over
        classes.
        """
        return 100 / (len(self.objects) * self.objects[self.rarest])

    @property
    def unseen(self) -> float:
        """Share of images that may lose something although none of the sample does.

        The upper end of the exact one-sided interval of a share without observed cases.
        """
        return float(1 - (1 - CONFIDENCE) ** (1 / self.reporting))

    def log(self, target: Target) -> None:
        """Log the precision; a warning if it is low, or too low for the target."""
        total = self.choosing + self.reporting
        text = (
            f"{total} images: {self.choosing} to choose exits on, {self.reporting} to judge them "
            f"by, with {sum(self.objects.values())} objects of {len(self.objects)} class(es), "
            f"fewest of {printable(self.rarest, longest=40)} ({self.objects[self.rarest]}). One of "
            f"these is worth up to {self.step:.2g} points of AP. Even if none of these "
            f"{self.reporting} images loses anything, something may be lost on "
            f"{100 * self.unseen:.2g} % of images like them ({100 * CONFIDENCE:g} % confidence)."
        )
        drop = target.max_ap_drop
        is_too_small = drop is not None and drop < self.step
        if is_too_small:
            # Until one object of the rarest class changes as much.
            wanted = f", {math.ceil(total * self.step / drop)} or more" if drop else ""
            text += (
                f" --max-ap-drop {drop:g} is less than one object: chance decides whether it is "
                f"kept. Use more images{wanted}, or a larger drop."
            )
        elif total < ENOUGH_IMAGES:
            text += f" Better use {ENOUGH_IMAGES} images or more."
        logger.log(
            logging.WARNING if is_too_small or total < ENOUGH_IMAGES else logging.INFO, "%s", text
        )
