"""Detection in overlapping slices of large images, as SAHI does (arXiv 2202.06934)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from os import PathLike, fspath
from typing import overload

import numpy as np
import torch
from torch import Tensor

from cascade_det.core import Detections
from cascade_det.core.suppression import fuse
from cascade_det.data.given_images import Image, Images, check_images, given_pixels
from cascade_det.errors import ConfigError
from cascade_det.monitoring.monitor import ExitMonitor
from cascade_det.standalone.predictor import Predictor

MERGES = ("nms", "wbf")
LEAST_SIZE = 16  # pixels


class SlicedPredictor:
    """Detects in slices of images; takes the place of the predictor whose detector it uses.

    An image is cut into overlapping slices, and these run as images of their own, resized as such,
    in batches of the predictor; then the whole image runs, for objects larger than a slice. All
    detections go through one NMS. It compares boxes by the share of the smaller one that lies in
    the other, from ``MODEL.ROI_HEADS.NMS_THRESH_TEST`` on: an object that a border cuts is found in
    part in one slice and whole in its neighbour, and IoU would keep both. Or they are fused, by
    IoU.

    ``TEST.DETECTIONS_PER_IMAGE`` counts for each slice, not for the image.

    Args:
        predictor: detects in each slice.
        size: width and height of a slice in pixels of the image, at least 16; smaller images are
            one slice.
        overlap: the share of a slice that its neighbours have too, from 0 to below 1.
        merge: "nms", as above, or "wbf", weighted box fusion.

    Attributes:
        class_names: of the predictor.
        category_ids: of the predictor.
        monitor: of the predictor; every slice counts as an image, and so does the whole.
        batch_size: images to pass at once: 1, since slices fill the batches.

    Raises:
        ConfigError: the detector has masks, and boxes would be fused.
        ValueError: size or overlap is out of range, or ``merge`` unknown.
    """

    def __init__(
        self, predictor: Predictor, *, size: int, overlap: float = 0.2, merge: str = "nms"
    ) -> None:
        if size % 1 or size < LEAST_SIZE or not 0 <= overlap < 1:
            raise ValueError(
                f"slices of {size} pixels with an overlap of {overlap}: the size is a whole number "
                f"from {LEAST_SIZE} on, and the overlap a number from 0 to below 1"
            )
        if merge not in MERGES:
            raise ValueError(f"merge is {merge!r}, not one of {', '.join(MERGES)}")
        heads = predictor.detector.roi_heads
        if merge == "wbf" and heads.masks is not None:
            raise ConfigError(
                "slices cannot be merged by wbf, since there are no masks for fused boxes: merge "
                "them by nms, or set MODEL.MASK_ON to False"
            )
        self._selection = heads.selection
        self._predictor = predictor
        self.size = int(size)
        self.overlap = overlap
        self.merge = merge
        self.class_names = predictor.class_names
        self.category_ids = predictor.category_ids
        self.batch_size = 1

    @property
    def monitor(self) -> ExitMonitor:
        """See above."""
        return self._predictor.monitor

    @overload
    def __call__(self, images: Image, *, names: None = None) -> Detections: ...

    @overload
    def __call__(
        self, images: Images, *, names: Sequence[str] | None = None
    ) -> list[Detections]: ...

    def __call__(
        self, images: Image | Images, *, names: Sequence[str] | None = None
    ) -> Detections | list[Detections]:
        """Detect objects; arguments, results and errors as of ``Predictor``.

        The name of a slice is that of its image with its left and upper border, ``a.jpg#512,0``.
        """
        if isinstance(images, (np.ndarray, str, PathLike)):
            return self([images])[0]
        checked = check_images(images, names)
        given = [None if isinstance(i, np.ndarray) else fspath(i) for i in checked]
        named = given if names is None else names
        return [self._detect(image, name) for image, name in zip(checked, named, strict=True)]

    def _detect(self, image: Image, name: str | None) -> Detections:
        pixels = given_pixels(image, "BGR")
        height, width = pixels.shape[:2]
        whole = self._predictor([pixels], names=None if name is None else [name])
        corners = slice_corners(height, width, self.size, self.overlap)
        if len(corners) == 1:
            return whole[0]
        slices: list[Image] = [pixels[y : y + self.size, x : x + self.size] for x, y in corners]
        names = None if name is None else [f"{name}#{x},{y}" for x, y in corners]
        shifted = [
            replace(own, boxes=own.boxes + own.boxes.new_tensor([x, y, x, y]))
            for (x, y), own in zip(corners, self._predictor(slices, names=names), strict=True)
        ]
        return self._merged(_joined([*shifted, *whole]))

    def _merged(self, found: Detections) -> Detections:
        own = self._selection
        if self.merge == "wbf":
            # Most places are in one slice alone, so that being found once is no reason for doubt.
            return fuse(
                found, score_thresh=own.score_thresh, iou=own.nms_thresh, sources=1, most=-1
            )
        return suppress_parts(found, share=own.nms_thresh)


def slice_corners(height: int, width: int, size: int, overlap: float) -> list[tuple[int, int]]:
    """The slices of an image, row by row: x and y of their upper left corners.

    They are ``int(overlap * size)`` pixels into each other, and the last ones of rows and columns,
    which end at the border of the image, further.

    Args:
        height: of the image in pixels.
        width: of the image in pixels.
        size: of a slice in pixels.
        overlap: from 0 to below 1.
    """
    step = size - int(overlap * size)
    ends = [max(length - size, 0) for length in (height, width)]
    rows, columns = ([*range(0, end, step), end] for end in ends)
    return [(x, y) for y, x in product(rows, columns)]


def suppress_parts(found: Detections, *, share: float) -> Detections:
    """Drop boxes that share much of the smaller area with a better one of their class.

    Args:
        found: D, in any order.
        share: of the area of the smaller of two boxes that lies in both, from which on the one
            with the lower score is dropped.

    Returns:
        Best first.
    """
    found = found[torch.argsort(found.scores, descending=True, stable=True)]
    boxes = found.boxes.double()
    # Moved apart, boxes of different classes share nothing; float64 keeps their pixels.
    apart = found.classes * (boxes.max() - boxes.min() + 1) if len(found) else found.classes
    boxes = boxes + apart[:, None]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    is_left = torch.ones_like(found.classes, dtype=torch.bool)
    rows = []
    for row in range(len(found)):
        if not is_left[row]:
            continue
        rows.append(row)
        smaller = torch.minimum(areas[row], areas)
        is_left &= (_shared(boxes[row], boxes) < share * smaller) | (smaller == 0)
    return found[torch.tensor(rows, dtype=torch.int64)]


def _shared(box: Tensor, boxes: Tensor) -> Tensor:
    """The area ``[D]`` that a box ``[4]`` has in common with each of ``[D, 4]``."""
    low = torch.maximum(box[:2], boxes[:, :2])
    high = torch.minimum(box[2:], boxes[:, 2:])
    return (high - low).clamp(min=0).prod(dim=1)


def _joined(found: Sequence[Detections]) -> Detections:
    masks = [own.masks for own in found if own.masks is not None]
    return Detections(
        torch.cat([own.boxes for own in found]),
        torch.cat([own.scores for own in found]),
        torch.cat([own.classes for own in found]),
        torch.cat([own.exit_stages for own in found]),
        torch.cat(masks) if masks else None,
    )
