"""Test-time augmentation: an image in several sizes, also mirrored, and one result for all.

As Detectron2's ``GeneralizedRCNNWithTTA``, but the backbone runs once for each view of an image:
its maps are kept until masks are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from cascade_det.core import CascadeStats, Detections, DetectorOutput, PartTimer
from cascade_det.core.modes import evaluation_mode
from cascade_det.core.postprocess import select_detections
from cascade_det.core.regions import ReportedRegions
from cascade_det.core.structures import part
from cascade_det.core.structures.boxes import clip_boxes, flatten_images, image_bounds, is_nonempty
from cascade_det.data.samples import Sample
from cascade_det.data.transforms import resize_shortest_edge
from cascade_det.engine.batches import check_images
from cascade_det.layers.tiles import as_tensor
from cascade_det.standalone.detector import Detector

# Detectron2's. Views of a batch are padded to one size, which changes their maps a little.
_VIEWS_PER_BATCH = 3


@dataclass(frozen=True)
class _View:
    """One augmentation of an image.

    Attributes:
        image: uint8 ``[3, H, W]``.
        sizes: ``(height, width)`` of the original, of the test image, and of this view of it.
        mirrored: whether left and right are exchanged.
    """

    image: Tensor
    sizes: tuple[tuple[int, int], ...]
    mirrored: bool

    def from_original(self, boxes: Tensor) -> Tensor:
        """Boxes ``[D, 4]`` of the original in pixels of the view."""
        return self._mirror(_scale(boxes, self.sizes))

    def to_original(self, boxes: Tensor) -> Tensor:
        """Boxes ``[D, 4]`` of the view in pixels of the original."""
        return _scale(self._mirror(boxes), self.sizes[::-1])

    def _mirror(self, boxes: Tensor) -> Tensor:
        if not self.mirrored:
            return boxes
        x0, y0, x1, y1 = boxes.unbind(dim=1)
        width = self.image.shape[-1]
        return torch.stack((width - x1, y0, width - x0, y1), dim=1)


class AugmentedDetector:
    """A detector that looks at each image in several sizes, and mirrored.

    The boxes of all views go through one NMS, or what ``MODEL.CASCADE.SUPPRESSION`` has instead,
    as those of each view did; masks are averaged over the views.

    Args:
        detector: with its weights; may be optimised.
        min_sizes: shorter edges in pixels of the views; 0 for the size of the test image.
        max_size: largest longer edge in pixels.
        flip: whether each size is also mirrored.
    """

    def __init__(
        self, detector: Detector, *, min_sizes: Sequence[int], max_size: int, flip: bool
    ) -> None:
        self.detector = detector
        self.min_sizes = tuple(min_sizes)
        self.max_size = max_size
        self.flip = flip

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the detector."""
        return self.detector.parameters()

    @torch.no_grad()
    def detect(
        self,
        batch: Sequence[Sample],
        *,
        stages: bool | Sequence[bool] = False,
        timer: PartTimer | None = None,
    ) -> DetectorOutput:
        """Detect objects in a batch, image by image.

        Memory grows with the sum of the views of one image if the detector has masks.

        Args:
            batch: as in ``Detector.detect``; images are on the CPU.
            stages: must be false: views are merged after the last stage.
            timer: measures the milliseconds of ``boxes`` and ``masks``.

        Returns:
            Detections in pixels of the original images. The statistics count detections and masks
            only.

        Raises:
            ValueError: as in ``Detector.detect``, or ``stages`` is true.
        """
        if stages if isinstance(stages, bool) else any(stages):
            raise ValueError("there are no detections of single stages with augmentation")
        check_images(batch)
        stats = CascadeStats.empty(self.detector.roi_heads.num_stages)
        with evaluation_mode(self.detector):
            detections = [self._detect_one(sample, stats, timer) for sample in batch]
        return DetectorOutput(detections, stats)

    def _detect_one(
        self, sample: Sample, stats: CascadeStats, timer: PartTimer | None
    ) -> Detections:
        heads = self.detector.roi_heads
        height, width = sample["image"].shape[-2:]
        original = (sample.get("height", height), sample.get("width", width))
        views = self._views(sample["image"], original)
        batches = [
            views[start : start + _VIEWS_PER_BATCH]
            for start in range(0, len(views), _VIEWS_PER_BATCH)
        ]
        found: list[Detections] = []
        features: list[list[Tensor]] = []
        with part(timer, "boxes"):
            for own in batches:
                started = heads.now()
                inputs = self.detector.cascade_inputs([{"image": view.image} for view in own])
                detected, _ = heads.detect(**vars(inputs), started=started, masks=False)
                found += [
                    replace(d, boxes=view.to_original(d.boxes))
                    for view, d in zip(own, detected, strict=True)
                ]
                if heads.masks is not None:
                    features.append([as_tensor(x) for x in inputs.features])
            merged = self._merge(found, original)
        if heads.masks is not None:
            with part(timer, "masks"):
                merged, masks = self._with_masks(merged, batches, features)
            stats.detected += len(merged)
            stats.masks += masks
        # Detectron2 leaves empty boxes out only where it makes masks.
        return merged[is_nonempty(merged.boxes)]

    def _views(self, image: Tensor, original: tuple[int, int]) -> list[_View]:
        pixels = image.permute(1, 2, 0).numpy()
        views = []
        for short_edge in self.min_sizes:
            resized = resize_shortest_edge(pixels, short_edge, self.max_size)
            sizes = (original, pixels.shape[:2], resized.shape[:2])
            for mirrored in (False, True) if self.flip else (False,):
                seen = resized[:, ::-1] if mirrored else resized
                tensor = torch.from_numpy(np.array(seen.transpose(2, 0, 1), order="C"))
                views.append(_View(tensor, sizes, mirrored))
        return views

    def _merge(self, found: Sequence[Detections], size: tuple[int, int]) -> Detections:
        """NMS, or the like, of all views' detections, in an image of ``size`` (height, width)."""
        heads = self.detector.roi_heads
        boxes, scores, classes, exit_stages = (
            torch.cat([getattr(d, name) for d in found])
            for name in ("boxes", "scores", "classes", "exit_stages")
        )
        probs = scores.new_zeros(len(scores), heads.num_classes + 1)
        every = torch.arange(len(scores), device=scores.device)
        probs[every, classes] = scores
        reported = ReportedRegions(
            boxes=clip_boxes(boxes, image_bounds([size], boxes)),
            probs=probs,
            image_index=torch.zeros_like(classes),
            exit_stages=exit_stages,
            proposal_index=every,
        )
        # All views together are the sources of a fused box. Its score, and that of a box which
        # soft-NMS lowers, may fall below the threshold that it was above in its view.
        selection = replace(heads.selection, sources=len(found))
        return select_detections([reported], 1, selection)[0]

    def _with_masks(
        self,
        merged: Detections,
        batches: Sequence[Sequence[_View]],
        features: Sequence[list[Tensor]],
    ) -> tuple[Detections, int]:
        """The detections with the means of their masks in all views, and how many got one."""
        heads = self.detector.roi_heads
        assert heads.masks is not None
        rows = torch.nonzero(heads.masks.rules.chosen(merged)).squeeze(1)
        chosen = merged[rows]
        masks = []
        for own, maps in zip(batches, features, strict=True):
            boxes, image_index = flatten_images([view.from_original(chosen.boxes) for view in own])
            classes = chosen.classes.repeat(len(own))
            made = heads.masks.probabilities(heads.pyramid(maps), boxes, image_index, classes)
            for view, seen in zip(own, made.unflatten(0, (len(own), len(rows))), strict=True):
                masks.append(seen.flip(2) if view.mirrored else seen)
        mean = torch.stack(masks).mean(dim=0)  # [D, M, M]
        full = mean.new_zeros(len(merged), *mean.shape[1:]).index_copy_(0, rows, mean)
        return replace(merged, masks=full), len(rows)


def _scale(boxes: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Boxes ``[D, 4]`` from the first to the last size of an image.

    One step after the other, as Detectron2 does, to round as it does.
    """
    for (height, width), (new_height, new_width) in pairwise(sizes):
        boxes = boxes * boxes.new_tensor([new_width / width, new_height / height] * 2)
    return boxes
