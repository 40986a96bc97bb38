"""Segments a batch with a segmenter of either host, part by part, with its exits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from cascade_det.core.structures import PartTimer, part
from cascade_det.data.samples import Sample
from cascade_det.engine.detector import CascadeSegmenter
from cascade_det.segmentation.logits import predict, resize
from cascade_det.segmentation.output import SegmenterOutput, SegmenterStats


def segment_in_parts(
    segmenter: CascadeSegmenter,
    batch: Sequence[Sample],
    *,
    levels: bool = False,
    timer: PartTimer | None = None,
) -> SegmenterOutput:
    """Segment a batch in the mode of the modules.

    Args:
        segmenter: encodes images, and has a decoder.
        batch: samples.
        levels: also report what the whole decoder predicts after each level.
        timer: measures the milliseconds of every part; with ``levels`` also those of the whole
            decoder, ``full/stage0`` and so on.
    """
    if len(batch) == 0:
        return SegmenterOutput([], SegmenterStats(), [] if levels else None)
    head = segmenter.sem_seg_head
    encoded, exits = segmenter.encode(batch, timer), head.exits
    logits = head.decode(encoded.maps, timer) if exits is None else []
    exited = None if exits is None else exits(encoded.maps, timer)
    size = encoded.size
    with part(timer, "postprocess"):
        scores = predict(logits, size) if exited is None else resize(exited.logits, size)
        resized = segmenter.at_original_size(scores, encoded, batch)
    after_levels = None
    if levels:
        logits = logits or head.decode(encoded.maps, timer, prefix="full/")
        after_levels = [
            [
                x.argmax(0)
                for x in segmenter.at_original_size(
                    predict(logits[: level + 1], size), encoded, batch
                )
            ]
            for level in range(len(logits))
        ]
    left_after = None if exited is None else exited.levels
    stats = SegmenterStats(left=left_after_levels(left_after, len(batch), len(encoded.maps)))
    return SegmenterOutput(resized, stats, after_levels)


def left_after_levels(
    levels: Tensor | None, images: int, num_levels: int
) -> list[Mapping[str, int]]:
    """The statistics of exits: by level, see ``SegmenterStats``."""
    if levels is None:
        return [*({} for _ in range(num_levels - 1)), {"completed": images}]
    *early, completed = levels.flatten().bincount(minlength=num_levels).tolist()
    return [*({"confident": count} for count in early), {"completed": completed}]
