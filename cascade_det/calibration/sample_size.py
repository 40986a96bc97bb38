"""Logs how precise a calibration on the given images can be, before any work begins."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from cascade_det.calibration.image_matching import ImageMatcher
from cascade_det.calibration.target import Target
from cascade_det.errors import DatasetError
from cascade_det.text import printable

logger = logging.getLogger(__name__)

# With fewer images, the log line is a warning.
ENOUGH_IMAGES = 200
CONFIDENCE = 0.95


@dataclass(frozen=True)
class SampleSize:
    """The numbers of images and objects.

    Attributes:
        images: their number.
        objects: objects by the name of their class, of classes that have any.
    """

    images: int
    objects: dict[str, int]

    @classmethod
    def of(
        cls,
        image_ids: Sequence[int],
        matcher: ImageMatcher,
        class_names: Sequence[str],
    ) -> SampleSize:
        """Count images and objects.

        Args:
            image_ids: one or more.
            matcher: of the ground truth.
            class_names: of the classes ``0..K-1``.

        Raises:
            DatasetError: fewer than two of the images have objects.
        """
        classes = [matcher.objects_of(image_id)[1] for image_id in image_ids]
        if (count := sum(len(own) > 0 for own in classes)) < 2:
            raise DatasetError(
                f"Only {count} of the {len(image_ids)} images has objects: what is chosen on some "
                "images is judged by others. Use more images with objects."
            )
        counts = np.bincount(np.concatenate(classes), minlength=len(class_names)).tolist()
        named = zip(class_names, counts, strict=True)
        return cls(len(image_ids), {name: n for name, n in named if n})

    @property
    def rarest(self) -> str:
        """The class with the fewest objects."""
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
        return float(1 - (1 - CONFIDENCE) ** (1 / self.images))

    def log(self, target: Target) -> None:
        """Log the precision; a warning if it is low, or too low for the target."""
        total = self.images
        text = (
            f"{total} images with {sum(self.objects.values())} objects of {len(self.objects)} "
            f"class(es), fewest of {printable(self.rarest, longest=40)} "
            f"({self.objects[self.rarest]}). One of these is worth up to {self.step:.2g} points of "
            f"AP. Even if none of these images loses anything, something may be lost on "
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


def images_to_search(sample: SampleSize, deviation: float, most_drop: float) -> float:
    """How many images a free search takes, infinite for a drop of 0.

    Half of the images judge what it finds. On them, neither the one-sided bound of a drop nor one
    object may be more than a quarter of the limit away: halving the images then costs little.

    Args:
        sample: all images.
        deviation: of the drop of AP of the default exits on all images, in percent points.
        most_drop: the limit, in percent points.
    """
    if most_drop == 0 or math.isnan(deviation):
        return math.inf
    on_half = math.sqrt(2) * NormalDist().inv_cdf(CONFIDENCE) * deviation
    return math.ceil(
        sample.images * max((4 * on_half / most_drop) ** 2, 4 * 2 * sample.step / most_drop)
    )
