"""Draws the truth and the prediction of an image side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cascade_det.report.drawing import caption
from cascade_det.report.label_drawing import Labels, label_legend, paint_labels, present_labels
from cascade_det.report.mistakes import enlargement
from cascade_det.text import printable

_WHITE, _GAP = (255, 255, 255), 4
_LONGEST_NAME = 60


def draw_segmentation_mistakes(
    image_bgr: npt.NDArray[np.uint8],
    truth: Labels,
    prediction: Labels,
    class_names: Sequence[str],
    *,
    title: str,
    ignored: int,
) -> npt.NDArray[np.uint8]:
    """Draw the classes of the truth on the left, and those of the prediction on the right.

    Args:
        image_bgr: uint8 ``[H, W, 3]``; not changed.
        truth: ``[H, W]``, the class of each pixel, or the ignored value.
        prediction: ``[H, W]``, the class of each pixel.
        class_names: of the K classes.
        title: a line above, such as the name of the image.
        ignored: the label of pixels of the truth that do not count.

    Returns:
        A new picture, enlarged by a whole number if the image is small, between lines of text and
        a legend of the classes.
    """
    factor = enlargement(*image_bgr.shape[:2])
    image = image_bgr.repeat(factor, axis=0).repeat(factor, axis=1)
    halves = [
        paint_labels(image, labels.repeat(factor, 0).repeat(factor, 1), class_names, ignored=white)
        for labels, white in ((truth, ignored), (prediction, None))
    ]
    gap = np.full((len(image), _GAP, 3), _WHITE, np.uint8)
    both = np.concatenate([halves[0], gap, halves[1]], axis=1)
    present = sorted({*present_labels(truth), *present_labels(prediction)})
    return np.concatenate(
        [
            caption(both, printable(title, longest=_LONGEST_NAME), _WHITE),
            caption(both, "truth on the left, prediction on the right", _WHITE),
            both,
            label_legend(both, present, class_names, ignored=ignored),
        ]
    )
