"""What a sample of images can show of exits, told before any work on it begins."""

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

# From so many images on nothing is said of their number.
ENOUGH_IMAGES = 200
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Sample:
    """The two halves of the images.

    Attributes:
        choosing: images that exits are chosen on.
        reporting: images that they are judged by.
        objects: on the latter, how many there are of each class that has any there, by name.
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
    ) -> Sample:
        """That of images whose places were split."""
        choosing, reporting = halves
        classes = [matcher.objects_of(image_ids[place])[1] for place in reporting]
        counts = np.bincount(np.concatenate(classes), minlength=len(class_names)).tolist()
        named = zip(class_names, counts, strict=True)
        return cls(len(choosing), len(reporting), {name: n for name, n in named if n})

    @property
    def rarest(self) -> str:
        """The class with the fewest objects to judge by."""
        return min(self.objects, key=lambda name: self.objects[name])

    @property
    def step(self) -> float:
        """Percent points of AP that one object of the rarest class makes at most.

        Its recall changes by one over the number of its objects, and AP is a mean over classes.
        """
        return 100 / (len(self.objects) * self.objects[self.rarest])

    @property
    def unseen(self) -> float:
        """Share of images on which something may be lost though nothing was seen to be.

        The upper end of the exact one-sided interval of a share of which no case was seen.
        """
        return float(1 - (1 - CONFIDENCE) ** (1 / self.reporting))

    def images_for(self, points: float) -> int:
        """About how many images like these one object is no more than ``points`` of AP on."""
        return math.ceil((self.choosing + self.reporting) * self.step / points)

    def tell(self, target: Target) -> None:
        """Log what the sample can show; a warning where it is little, or less than is asked for."""
        total = self.choosing + self.reporting
        text = (
            f"{total} images: {self.choosing} to choose exits on, {self.reporting} to judge them "
            f"by, with {sum(self.objects.values())} objects of {len(self.objects)} class(es), "
            f"fewest of {printable(self.rarest, longest=40)} ({self.objects[self.rarest]}). One of "
            f"these is up to {self.step:.2g} points of AP; and where nothing is lost on any of "
            f"these {self.reporting} images, something may still be lost on "
            f"{100 * self.unseen:.2g} % of images like them ({100 * CONFIDENCE:g} % confidence)."
        )
        drop = target.max_ap_drop
        is_too_small = drop is not None and drop < self.step
        if is_too_small:
            wanted = f", {self.images_for(drop)} or more" if drop else ""
            text += (
                f" --max-ap-drop {drop:g} is less than one object: whether it is kept is chance. "
                f"Give more images{wanted}, or a larger drop."
            )
        elif total < ENOUGH_IMAGES:
            text += f" {ENOUGH_IMAGES} images or more say more."
        logger.log(
            logging.WARNING if is_too_small or total < ENOUGH_IMAGES else logging.INFO, "%s", text
        )
