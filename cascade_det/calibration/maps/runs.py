"""Runs a segmenter with several decoders in turn: the whole one, exits, and simpler ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from cascade_det.calibration.maps.record import Counts, Labels, confusion, patches_of_pixels
from cascade_det.core.structures import PartTimer, part
from cascade_det.data.samples import Batch, Sample
from cascade_det.engine.detector import CascadeSegmenter
from cascade_det.segmentation.logits import predict, resize
from cascade_det.segmentation.map_exits import MapExits
from cascade_det.segmentation.output import EncodedImages

FULL = "no exits"
ORACLE = "oracle of patches"
# Sides of smaller images, as shares.
_SCALES = (0.75, 0.5)

Floats = npt.NDArray[np.float64]


@dataclass
class Answer:
    """What a decoder answers for a batch.

    Attributes:
        labels: int64 ``[height, width]`` of each image.
        timer: milliseconds by part, the encoder's included.
        levels: the last level of each image or patch, see ``ExitedMaps``; else ``None``.
    """

    labels: list[Tensor]
    timer: PartTimer
    levels: Tensor | None = None


@dataclass
class Run:
    """One decoder on I images.

    Attributes:
        counts: int64 ``[I, K, K]``, pixels by true and predicted class.
        lost: ``[I]``, share of the pixels that the whole decoder has right and this one wrong.
        decoder_ms: ``[I]``, milliseconds of the levels, and of exits in them.
        total_ms: ``[I]``, of the whole model.
        left: ``[I, L]``, share of the image's patches, or of itself, that left after each level.
    """

    counts: Counts
    lost: Floats
    decoder_ms: Floats
    total_ms: Floats
    left: Floats

    @property
    def computed(self) -> float:
        """Mean share of the patches or images that a later level is computed for, 0 to 1."""
        entered = 1 - self.left.cumsum(axis=1)[:, :-1]
        return float(entered.mean())

    def of(self, images: Sequence[int]) -> Run:
        """The run on some of the images."""
        index = list(images)
        return Run(*(values[index] for values in vars(self).values()))


Decoder = Callable[[Batch, EncodedImages, PartTimer, Sequence[Labels]], Answer]


def run_decoders(
    segmenter: CascadeSegmenter,
    batches: Sequence[Batch],
    truth_of: Callable[[Sample], Labels],
    settings: Mapping[str, Mapping[str, Any]],
    *,
    ignore_label: int,
    num_classes: int,
    patch: int,
    channel_gates: str,
    on_image: Callable[[int], object] = lambda count: None,
) -> dict[str, Run]:
    """Run the whole decoder, exits and their competitors on every batch, in turn.

    Competitors are decoders that stop after a level, smaller images, and an oracle of patches that
    knows the truth: each leaves after the first level that has as many of its pixels right as the
    last one. The oracle computes no confidence.

    Args:
        segmenter: in evaluation mode; its own exits are not used.
        batches: of images.
        truth_of: labels of the image of a sample, integers ``[height, width]``.
        settings: exits by name: arguments of ``MapExits`` but the last two.
        ignore_label: truth of pixels that do not count.
        num_classes: K.
        patch: see ``MapExits``.
        channel_gates: see ``MapExits``.
        on_image: called with the number of images done.

    Returns:
        By name; ``FULL`` is first.
    """
    head = segmenter.sem_seg_head
    decoders: dict[str, Decoder] = {FULL: _whole(segmenter)}
    # One for all settings, so that there is one copy of the weights.
    exits = _GivenExits(
        head.decoder, head.heads, thresholds=(), patch=patch, channel_gates=channel_gates
    )
    for name, setting in settings.items():
        decoders[name] = _exiting(segmenter, exits, setting)
    for level in range(len(head.heads) - 1):
        decoders[f"decoder up to level {level}"] = _stopping(segmenter, level)
    for scale in _SCALES:
        decoders[f"smaller image, side x {scale:g}"] = _smaller(segmenter, scale)
    decoders[ORACLE] = _by_oracle(segmenter, exits)
    rows: dict[str, list[tuple[Any, ...]]] = {name: [] for name in decoders}
    with torch.inference_mode():
        seen = set()
        for batch in batches:
            truths = [truth_of(sample) for sample in batch]
            shapes = tuple(sample["image"].shape for sample in batch)
            # The first call with new shapes is slow.
            for timed in [True] if shapes in seen else [False, True]:
                _run_batch(
                    segmenter,
                    decoders,
                    batch,
                    truths,
                    rows if timed else {},
                    ignore_label,
                    num_classes,
                )
            seen.add(shapes)
            on_image(len(batch))
    return {
        name: Run(*(np.stack(column) for column in zip(*of_decoder, strict=True)))
        for name, of_decoder in rows.items()
    }


def _run_batch(
    segmenter: CascadeSegmenter,
    decoders: Mapping[str, Decoder],
    batch: Batch,
    truths: Sequence[Labels],
    rows: dict[str, list[tuple[Any, ...]]],
    ignore_label: int,
    num_classes: int,
) -> None:
    device = next(segmenter.parameters()).device
    before = PartTimer(device)
    encoded = segmenter.encode(batch, before)
    num_levels = len(encoded.maps)
    right: list[npt.NDArray[np.bool_]] = []
    for name, decoder in decoders.items():
        timer = PartTimer(device)
        timer.milliseconds.update(before.milliseconds)
        answer = decoder(batch, encoded, timer, truths)
        milliseconds = answer.timer.milliseconds
        total = sum(milliseconds.values()) / len(batch)
        levels = sum(ms for key, ms in milliseconds.items() if key.startswith("stage"))
        own = [labels.cpu().numpy() for labels in answer.labels]
        if name == FULL:
            right = [
                (labels == truth) & (truth != ignore_label)
                for labels, truth in zip(own, truths, strict=True)
            ]
        for image, (labels, truth) in enumerate(zip(own, truths, strict=True)):
            counts = confusion(truth, labels, num_classes, ignore_label)
            lost = (right[image] & (labels != truth)).sum() / max(right[image].sum(), 1)
            if answer.levels is None:
                left = np.eye(num_levels)[-1]
            else:
                left = answer.levels[image].flatten().bincount(minlength=num_levels).numpy()
                left = left / left.sum()
            row = counts, lost, levels / len(batch), total, left
            rows.setdefault(name, []).append(row)


def _whole(segmenter: CascadeSegmenter) -> Decoder:
    def decode(
        batch: Batch, encoded: EncodedImages, timer: PartTimer, truths: Sequence[Labels]
    ) -> Answer:
        logits = segmenter.sem_seg_head.decode(encoded.maps, timer)
        return _finish(segmenter, batch, encoded, timer, predict, logits)

    return decode


def _stopping(segmenter: CascadeSegmenter, level: int) -> Decoder:
    """The whole decoder up to a level, without a decision."""

    def decode(
        batch: Batch, encoded: EncodedImages, timer: PartTimer, truths: Sequence[Labels]
    ) -> Answer:
        logits = segmenter.sem_seg_head.decode(encoded.maps, timer, last=level)
        answer = _finish(segmenter, batch, encoded, timer, predict, logits)
        answer.levels = torch.full((len(batch),), level)
        return answer

    return decode


class _GivenExits(MapExits):
    """Exits that may be set to leave at given levels, ``[N, G, B]``."""

    given: Tensor | None = None

    def _leaves(self, level: int, so_far: Tensor, size: tuple[int, int]) -> Tensor:
        if self.given is not None:
            return self.given <= level
        return super()._leaves(level, so_far, size)


def _exiting(
    segmenter: CascadeSegmenter, exits: _GivenExits, setting: Mapping[str, Any]
) -> Decoder:
    def decode(
        batch: Batch, encoded: EncodedImages, timer: PartTimer, truths: Sequence[Labels]
    ) -> Answer:
        for name, value in {"given": None, **setting}.items():
            setattr(exits, name, value)
        exited = exits(encoded.maps, timer)
        answer = _finish(segmenter, batch, encoded, timer, resize, exited.logits)
        answer.levels = exited.levels.cpu()
        return answer

    return decode


def _smaller(segmenter: CascadeSegmenter, scale: float) -> Decoder:
    """The whole model on smaller images."""

    def decode(
        batch: Batch, encoded: EncodedImages, timer: PartTimer, truths: Sequence[Labels]
    ) -> Answer:
        timer = PartTimer(timer.device)
        small = []
        for sample, truth in zip(batch, truths, strict=True):
            image = sample["image"]
            size = [max(1, round(side * scale)) for side in image.shape[-2:]]
            resized = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
            if image.dtype == torch.uint8:
                resized = resized.round().to(torch.uint8)
            height, width = truth.shape
            small.append({**sample, "image": resized, "height": height, "width": width})
        again = segmenter.encode(small, timer)
        logits = segmenter.sem_seg_head.decode(again.maps, timer)
        return _finish(segmenter, small, again, timer, predict, logits)

    return decode


def _by_oracle(segmenter: CascadeSegmenter, exits: _GivenExits) -> Decoder:
    def decode(
        batch: Batch, encoded: EncodedImages, timer: PartTimer, truths: Sequence[Labels]
    ) -> Answer:
        logits = segmenter.sem_seg_head.decode(encoded.maps)
        height, width = logits[-1].shape[-2:]
        grid = -(-height // exits.patch), -(-width // exits.patch)
        settled = []
        for level in range(len(logits)):
            answer = _finish(segmenter, batch, encoded, None, predict, logits[: level + 1])
            settled.append([labels.cpu().numpy() for labels in answer.labels])
        given = []
        for image, truth in enumerate(truths):
            own = encoded.image_sizes[image]
            patches = patches_of_pixels(truth.shape, own, encoded, exits.patch)
            right = np.stack(
                [
                    np.bincount(patches[level[image] == truth], minlength=grid[0] * grid[1])
                    for level in settled
                ]
            )
            given.append((right >= right[-1]).argmax(0).reshape(grid))
        thresholds = (0.0,) * (len(logits) - 1)
        setting = {
            "kind": "patch",
            "thresholds": thresholds,
            "given": torch.from_numpy(np.stack(given)).to(encoded.maps[0].device),
        }
        return _exiting(segmenter, exits, setting)(batch, encoded, timer, truths)

    return decode


def _finish(
    segmenter: CascadeSegmenter,
    batch: Batch,
    encoded: EncodedImages,
    timer: PartTimer | None,
    join: Callable[[Any, tuple[int, int]], Tensor],
    logits: Any,
) -> Answer:
    with part(timer, "postprocess"):
        scores = segmenter.at_original_size(join(logits, encoded.size), encoded, batch)
    labels = [x.argmax(0) for x in scores]
    return Answer(labels, timer or PartTimer())
