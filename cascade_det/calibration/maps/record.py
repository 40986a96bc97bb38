"""A record of the whole decoder on some images, and what exits would have answered.

L levels, coarsest first; P patches of an image, or 1 for the image itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cascade_det.evaluation.semantic import ConfusionMatrix, Counts, Labels
from cascade_det.segmentation.logits import predict
from cascade_det.segmentation.map_confidence import MEASURES, image_confidence, patch_confidence
from cascade_det.segmentation.map_exits import (
    DENSE_SHARE,
    KINDS,
    computed_share,
    level_halos,
    patch_pixels,
)
from cascade_det.segmentation.output import EncodedImages
from cascade_det.segmentation.pixel_rows import dilate

# Settings are compared on every second row and column; the found ones run on all pixels.
STEP = 2


class MapRecord(NamedTuple):
    """The whole decoder on one image, at n of its pixels.

    Attributes:
        labels: ``[L, n]``, predicted after each level.
        truth: ``[n]``.
        patches: int64 ``[n]``, the patch of each pixel.
        confidence: by kind and measure, float32 ``[L - 1, P]``.
        sizes: of the levels' maps.
        patch: side of a patch in pixels of the finest map.
    """

    labels: Labels
    truth: Labels
    patches: npt.NDArray[np.int64]
    confidence: dict[tuple[str, str], npt.NDArray[np.float32]]
    sizes: list[tuple[int, int]]
    patch: int


class Replayed(NamedTuple):
    """What exits do with a recorded image.

    Attributes:
        counts: int64 ``[K, K]``, pixels by true and predicted class.
        computed: share of each level's pixels that are computed, 0 to 1.
    """

    counts: Counts
    computed: tuple[float, ...]


def patches_of_pixels(
    shape: tuple[int, int], own: tuple[int, int], encoded: EncodedImages, patch: int
) -> npt.NDArray[np.int64]:
    """The patch of each pixel of an image file, int64 ``[height, width]``.

    Args:
        shape: of the file.
        own: size of the image in the batch.
        encoded: the batch.
        patch: side in pixels of the finest map.
    """
    finest = encoded.maps[-1].shape[-2:]
    lines = []
    for sides in zip(shape, own, encoded.size, finest, strict=True):
        file, image, full, cells = sides
        places = (np.arange(file) + 0.5) * image / file * cells / full
        lines.append(places.astype(np.int64) // patch)
    return np.asarray(lines[0][:, None] * ceil(finest[1] / patch) + lines[1])


def record_images(
    logits: Sequence[Tensor],
    labels: Sequence[Sequence[Tensor]],
    truths: Sequence[Labels],
    encoded: EncodedImages,
    patch: int,
) -> list[MapRecord]:
    """Records of a batch of N images.

    Args:
        logits: of all levels, ``[N, K, H_l, W_l]``.
        labels: predicted after each level, for each image ``[height, width]``.
        truths: of each image, ``[height, width]``.
        encoded: the batch.
        patch: side of a patch in pixels of the finest map.
    """
    sizes = [(int(x.shape[2]), int(x.shape[3])) for x in logits]
    found: dict[tuple[str, str], list[Tensor]] = {(k, m): [] for k in KINDS for m in MEASURES}
    for level, size in enumerate(sizes[:-1]):
        so_far = predict(logits[: level + 1], size)
        for measure in MEASURES:
            of_patches = patch_confidence(so_far, measure, size=sizes[-1], patch=patch)
            found["patch", measure].append(of_patches.flatten(1))
            found["image", measure].append(image_confidence(so_far, measure)[:, None])
    confidence = {key: torch.stack(each).cpu().numpy() for key, each in found.items()}
    records = []
    for index, (truth, own) in enumerate(zip(truths, encoded.image_sizes, strict=True)):
        patches = patches_of_pixels(truth.shape, own, encoded, patch)
        of_levels = [level[index].cpu().numpy()[::STEP, ::STEP].ravel() for level in labels]
        classes = logits[0].shape[1]
        kept = np.stack(of_levels).astype(np.uint8 if classes <= 256 else np.int32)
        records.append(
            MapRecord(
                kept,
                truth[::STEP, ::STEP].ravel(),
                patches[::STEP, ::STEP].ravel(),
                {key: each[:, index] for key, each in confidence.items()},
                sizes,
                patch,
            )
        )
    return records


def replay(
    record: MapRecord, setting: dict[str, Any] | None, num_classes: int, ignore_label: int
) -> Replayed:
    """What exits answer, from a record.

    Channel attention is that of the whole decoder; real patches differ a little where it pools
    over fewer pixels.

    Args:
        record: of an image.
        setting: ``kind``, ``confidence`` and ``thresholds``; ``None`` for no exits.
        num_classes: K.
        ignore_label: truth of pixels that do not count.
    """
    last = len(record.labels) - 1
    if setting is None:
        answer, computed = record.labels[-1], (1.0,) * (last + 1)
    else:
        levels = first_exits(
            record.confidence[setting["kind"], setting["confidence"]], setting["thresholds"]
        )
        if setting["kind"] == "image":
            answer = record.labels[levels[0]]
            computed = tuple(float(levels[0] >= level) for level in range(last + 1))
        else:
            answer = record.labels[levels[record.patches], np.arange(len(record.truth))]
            computed = computed_shares(levels, record.sizes, record.patch)
    return Replayed(confusion(record.truth, answer, num_classes, ignore_label), computed)


def first_exits(
    confidence: npt.NDArray[np.float32], thresholds: Sequence[float]
) -> npt.NDArray[np.int64]:
    """The level after which each patch leaves: ``[L - 1, P]`` to int64 ``[P]``."""
    # In float32, as the exits compare them.
    leaves = confidence >= np.asarray(thresholds, np.float32)[:, None]
    return np.where(leaves.any(0), leaves.argmax(0), len(confidence))


def computed_shares(
    levels: npt.NDArray[np.int64], sizes: Sequence[tuple[int, int]], patch: int
) -> tuple[float, ...]:
    """Share of each level's pixels that are decoded, with the surroundings of patches.

    Args:
        levels: int64 ``[P]``, the last one of each patch.
        sizes: of the levels' maps.
        patch: side of a patch.
    """
    grid = [ceil(side / patch) for side in sizes[-1]]
    of_patches, halos = torch.from_numpy(levels).view(1, *grid), level_halos(list(sizes))
    shares: list[float] = []
    dense = True
    for level, size in enumerate(sizes):
        pixels = patch_pixels(of_patches >= level, patch, sizes[-1], size)
        share = computed_share(dilate(pixels, halos[level]))
        dense = dense and share > DENSE_SHARE
        shares.append(1.0 if dense else share)
    return tuple(shares)


def confusion(truth: Labels, answer: Labels, num_classes: int, ignore_label: int) -> Counts:
    """Pixels by true and predicted class, int64 ``[K, K]``."""
    matrix = ConfusionMatrix(num_classes, ignore_label=ignore_label)
    matrix.update(answer, truth)
    return matrix.counts
