"""Inputs and outputs of a cascade: detections, statistics of one call, milliseconds per part."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from cascade_det.detection_formats import (
    as_array,
    coco_results,
    labelled_boxes,
    supervision_detections,
)
from cascade_det.layers.tiles import FeatureMap, TiledMap
from cascade_det.masks.pasting import paste_masks

if TYPE_CHECKING:
    import supervision

EXIT_REASONS = ("background", "redundant", "confident", "budget", "completed")
Found = TypeVar("Found", bound="Detections")


@dataclass
class Detections:
    """The detections of one image, best score first.

    Attributes:
        boxes: float32 ``[D, 4]``, XYXY in absolute pixels.
        scores: float32 ``[D]`` in [0, 1].
        classes: int64 ``[D]`` in ``[0, K)``.
        exit_stages: int64 ``[D]``, the last stage (from 0) that ran on each region.
        masks: float32 ``[D, M, M]`` in [0, 1], the probability of the object in the cells of each
            box; all 0 for a detection without a mask. ``None`` for a detector without masks.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    exit_stages: Tensor
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self: Found, index: Tensor | slice) -> Found:
        return self._map(lambda field: field[index])

    def to(self: Found, device: torch.device | str) -> Found:
        """The same detections on another device."""
        return self._map(lambda field: field.to(device))

    def paste(self, height: int, width: int) -> Tensor:
        """The masks in an image: bool ``[D, height, width]`` on the CPU.

        Takes ``D * height * width`` bytes. ``cascade_det.masks.rle.encode_pasted`` writes the same
        masks as RLE, without this memory.

        Args:
            height: of the image that the boxes are in.
            width: of that image.

        Raises:
            ValueError: the detector has no masks.
        """
        if self.masks is None:
            raise ValueError("these detections have no masks: set MODEL.MASK_ON")
        masks, boxes = (x.detach().float().cpu().numpy() for x in (self.masks, self.boxes))
        return torch.from_numpy(paste_masks(masks, boxes, height, width))

    def to_dicts(self, class_names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """As the ``object-detection`` pipeline of Hugging Face's transformers gives them.

        Args:
            class_names: K names, such as those of the predictor; ``None`` for ``class 0``, ...

        Returns:
            For each detection ``{"score": float, "label": str, "box": {"xmin": int, "ymin": int,
            "xmax": int, "ymax": int}}``, pixels rounded towards 0 as there.

        Raises:
            ValueError: a class has no name.
        """
        return labelled_boxes(self, class_names)

    def to_coco(
        self,
        image_id: int,
        category_ids: Sequence[int] | None = None,
        *,
        size: tuple[int, int] | None = None,
    ) -> list[dict[str, Any]]:
        """In COCO's result format, for ``COCO.loadRes`` of pycocotools.

        Args:
            image_id: the id of the image in the annotations.
            category_ids: of the K classes, such as those of the predictor; ``None`` for ``1``, ...
            size: ``(height, width)`` of the image in pixels, for the RLE of masks.

        Returns:
            For each detection ``image_id``, ``category_id``, ``bbox`` (XYWH), ``score``,
            ``exit_stage`` and, if it has a mask, ``segmentation``.

        Raises:
            DatasetError: a class has no category id.
            ValueError: there are masks, and no ``size``.
        """
        if category_ids is None:
            category_ids = range(1, int(self.classes.max()) + 2) if len(self) else ()
        rle = None
        if self.masks is not None:
            # Its pycocotools is only needed here.
            from cascade_det.masks.rle import encode_pasted

            height, width = _given(size)
            rle = encode_pasted(as_array(self.masks), as_array(self.boxes), height, width)
        return coco_results(self, image_id, category_ids, rle)

    def to_supervision(
        self, class_names: Sequence[str] | None = None, *, size: tuple[int, int] | None = None
    ) -> supervision.Detections:
        """As ``supervision.Detections``, for its annotators, trackers and sinks.

        Args:
            class_names: K names, such as those of the predictor; ``None`` for ``class 0``, ...
            size: ``(height, width)`` of the image in pixels, for masks. These take
                ``D * height * width`` bytes.

        Returns:
            ``xyxy``, ``confidence``, ``class_id``, and in ``data`` ``class_name`` and
            ``exit_stage``; with masks, ``mask``, bool ``[D, height, width]``.

        Raises:
            ImportError: supervision, the extra ``[supervision]``, is not installed.
            ValueError: a class has no name, or there are masks and no ``size``.
        """
        masks = None if self.masks is None else self.paste(*_given(size)).numpy()
        return supervision_detections(self, class_names, masks)

    def _map(self: Found, change: Callable[[Tensor], Tensor]) -> Found:
        changed: dict[str, Any] = {
            name: None if field is None else change(field) for name, field in vars(self).items()
        }
        return replace(self, **changed)


def _given(size: tuple[int, int] | None) -> tuple[int, int]:
    if size is None:
        raise ValueError(
            "these detections have masks, whose pixels depend on the image: give its "
            "size=(height, width), such as image.shape[:2]"
        )
    return size


@dataclass
class CascadeStats:
    """Counts and times of one call of the cascade.

    Attributes:
        entered: S counts, regions of the whole batch that ran through each stage.
        left: S dicts, regions that exited after each stage, by reason (one of ``EXIT_REASONS``);
            ``sum(left[s].values()) == entered[s] - entered[s + 1]``.
        milliseconds: wall time per part; empty without a timer.
        proposed: proposals of the whole batch.
        left_before: proposals that exited before stage 0, by reason;
            ``proposed - sum(left_before.values()) == entered[0]``.
        confidence: S dicts, the summed scores (largest foreground probabilities) of the regions
            that exited after each stage, by reason; empty without exits.
        overrun_ms: milliseconds by which the call exceeded its time budget; 0 without one.
        detected: detections of the whole batch; 0 for a cascade without masks.
        masks: how many of them got a mask.
        tiles: tiles of the finest map of the whole batch; 0 without a tile gate.
        tiles_open: how many of them the RPN read.
        tiles_computed: how many of them were computed, for the RPN or for regions.
        tiles_whole: how many are of images whose tiles were all computed at once.
        tiles_dense: how many of those are of images whose tiles the RPN read all.
    """

    entered: list[int]
    left: list[dict[str, int]]
    milliseconds: dict[str, float] = field(default_factory=dict)
    proposed: int = 0
    left_before: dict[str, int] = field(default_factory=dict)
    confidence: list[dict[str, float]] = field(default_factory=list, compare=False)
    overrun_ms: float = field(default=0.0, compare=False)
    detected: int = field(default=0, compare=False)
    masks: int = field(default=0, compare=False)
    tiles: int = 0
    tiles_open: int = 0
    tiles_computed: int = 0
    tiles_whole: int = 0
    tiles_dense: int = 0

    @classmethod
    def empty(cls, num_stages: int) -> CascadeStats:
        """The statistics of a call without images."""
        return cls([0] * num_stages, [{} for _ in range(num_stages)])

    def count_tiles(self, finest: FeatureMap) -> None:
        """Count the tiles of the finest map, if it is computed in tiles."""
        if isinstance(finest, TiledMap):
            self.tiles = finest.computed.numel()
            dense = finest.opened.flatten(1).all(dim=1)
            counted = (finest.opened, finest.computed, finest.as_a_whole, dense)
            self.tiles_open, self.tiles_computed, *images = torch.stack(
                [x.sum() for x in counted]
            ).tolist()
            self.tiles_whole, self.tiles_dense = (
                count * finest.computed[0].numel() for count in images
            )


@dataclass
class StageOutput:
    """One stage of the full cascade (no exits), for per-stage evaluation.

    Row *i* of the boxes is the same region at every stage, in the pixels of ``detections``.

    Attributes:
        detections: per image, the result of a cascade that ends with this stage.
        boxes_before: per image ``[R_i, 4]``, the boxes that the stage pooled.
        boxes_after: per image ``[R_i, 4]``, the same boxes refined.
    """

    detections: list[Detections]
    boxes_before: list[Tensor]
    boxes_after: list[Tensor]


@dataclass
class CascadeInputs:
    """Arguments of ``CascadeHead.detect`` for a batch of N images.

    Attributes:
        features: L maps ``[N, C, H_l, W_l]``, finest first; the first may be a ``TiledMap``.
        proposals: per image float32 ``[R_i, 4]``.
        image_sizes: N ``(height, width)`` of the resized images.
        objectness: per image float32 ``[R_i]``, logits; ``None`` if unknown.
    """

    features: list[FeatureMap]
    proposals: list[Tensor]
    image_sizes: list[tuple[int, int]]
    objectness: list[Tensor] | None = None


@dataclass
class ImageTiles:
    """The tiles of the finest map of one image, with those of the padding of its batch.

    Attributes:
        opened: bool ``[P, Q]``, those that the RPN read.
        computed: bool ``[P, Q]``, those that were computed, for the RPN or for regions.
        height: of a tile in pixels of the original image.
        width: of a tile in pixels of the original image.
    """

    opened: Tensor
    computed: Tensor
    height: float
    width: float


@dataclass
class DetectorOutput:
    """The output of a detector for a batch.

    Attributes:
        detections: per image, in pixels of the original image.
        stats: counts and times of the cascade, summed over the batch.
        stages: one entry per stage if per-stage output was requested, else ``None``.
        tiles: per image, for pictures; ``None`` without a tile gate, and in Detectron2.
    """

    detections: list[Detections]
    stats: CascadeStats
    stages: list[StageOutput] | None = None
    tiles: list[ImageTiles] | None = None


class PartTimer:
    """Wall milliseconds of named parts of one call, with the GPU synchronised around each part.

    The time of a part inside another one is not counted for the outer one.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.milliseconds: dict[str, float] = {}
        self._inside = 0.0  # milliseconds of parts inside the present one

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the block to part ``name``."""
        self._synchronize()
        before, self._inside = self._inside, 0.0
        start = time.perf_counter()
        yield
        self._synchronize()
        elapsed = (time.perf_counter() - start) * 1000
        own = elapsed - self._inside
        self.milliseconds[name] = self.milliseconds.get(name, 0.0) + own
        self._inside = before + elapsed

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def part(timer: PartTimer | None, name: str) -> AbstractContextManager[None]:
    """``timer.part(name)``, or an empty context without a timer."""
    return nullcontext() if timer is None else timer.part(name)


def measure_tiles(maps: Mapping[str, FeatureMap], timer: PartTimer | None) -> None:
    """Measure the tiles of ``maps`` as the part ``tile gate``, for the RPN or for regions."""
    if timer is not None:
        for feature in maps.values():
            if isinstance(feature, TiledMap):
                feature.measured = partial(timer.part, "tile gate")
