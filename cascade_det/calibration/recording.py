"""Recording the full cascade on a data set, and timing exits on this device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from statistics import median
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cascade_det.calibration.image_matching import ImageMatcher
from cascade_det.calibration.latency_model import LatencyModel
from cascade_det.calibration.mask_overlaps import RecordedMasks, record_overlaps
from cascade_det.calibration.progress import progress_bar
from cascade_det.calibration.search_space import truncated_cascades
from cascade_det.calibration.trials import Recording
from cascade_det.core import ExitPolicy, PartTimer
from cascade_det.core.modes import evaluation_mode
from cascade_det.core.postprocess import Frame
from cascade_det.core.record import CascadeRecord, join_records
from cascade_det.core.structures import CascadeStats
from cascade_det.data.samples import Batch
from cascade_det.engine.detector import CascadeDetector
from cascade_det.engine.devices import device_name
from cascade_det.engine.head_flops import mask_flops, region_flops
from cascade_det.engine.inference import BatchLoader

# Of a call: what computes maps and tiles.
_MAP_PARTS = ("backbone", "tile gate", "rpn")
# Records are joined until they have as many images.
JOINED_IMAGES = 32
# Regions that enter the first and the later stages when latency is measured, as shares.
_GATED_SHARES = (1.0, 0.05)  # Of those in every stage, with a tile gate.
_SHARES = ((1.0, 1.0), *((first, later) for first in (1.0, 0.4, 0.1) for later in (0.3, 0.1, 0.02)))


def record_dataset(
    detector: CascadeDetector,
    loader: BatchLoader,
    most_images: int,
    matcher: ImageMatcher | None = None,
    tile_thresholds: Sequence[float] = (),
) -> Recording:
    """Run the full cascade and record the outputs of every region.

    Args:
        detector: in either host.
        loader: of the images, by id.
        most_images: limit of images; the rest of the loader is not used.
        matcher: of their masks; ``None`` where there are none to compare with.
        tile_thresholds: to record, 0 first, if the finest map can be computed in tiles; none
            records the whole map alone.
    """
    assert isinstance(detector, nn.Module)
    image_ids: list[int] = []
    frames: list[Frame] = []
    flops: tuple[float, ...] = ()
    masks: RecordedMasks | None = None

    def each() -> Iterator[CascadeRecord]:
        nonlocal flops, masks
        for batch in _first_images(loader, most_images):
            cascade, tiles = detector.cascade, None
            if tile_thresholds:
                inputs, tiles = detector.gated_inputs(batch, tile_thresholds)
            else:
                inputs = detector.cascade_inputs(batch)
            channels = inputs.features[0].shape[1]
            # First: a head whose FLOPs cannot be counted fails at once.
            flops = flops or region_flops(cascade, channels).stages
            if masks is None and cascade.masks is not None:
                of_mask = mask_flops(cascade.masks, channels)
                masks = RecordedMasks(cascade.masks.rules, of_mask, None if matcher is None else [])
            image_ids.extend(sample["image_id"] for sample in batch)
            sizes = [(int(height), int(width)) for height, width in inputs.image_sizes]
            own_frames = [
                (size, (sample["height"], sample["width"]))
                for sample, size in zip(batch, sizes, strict=True)
            ]
            frames.extend(own_frames)
            record = replace(cascade.record(**vars(inputs)), tiles=tiles).cpu()
            if masks is not None and masks.overlaps is not None:
                assert cascade.masks is not None
                assert matcher is not None
                objects = [matcher.masks_of(sample["image_id"]) for sample in batch]
                pyramid = cascade.pyramid(inputs.features)
                masks.overlaps.extend(
                    record_overlaps(cascade.masks, pyramid, record, own_frames, objects)
                )
            yield record
            step(len(batch))

    with (
        progress_bar("Recording images", most_images) as step,
        evaluation_mode(detector),
        torch.no_grad(),
    ):
        records = list(_joined(each()))
    return Recording(records, image_ids, frames, flops, masks)


def _first_images(loader: BatchLoader, count: int) -> Iterator[Batch]:
    for batch in loader:
        yield batch[:count]
        count -= len(batch)
        if count <= 0:
            return


def _joined(records: Iterable[CascadeRecord]) -> Iterator[CascadeRecord]:
    """Join records: fewer and larger ones are replayed faster."""
    waiting: list[CascadeRecord] = []
    for record in records:
        waiting.append(record)
        if sum(one.num_images for one in waiting) >= JOINED_IMAGES:
            yield join_records(waiting)
            waiting = []
    if waiting:
        yield join_records(waiting)


class Timing(NamedTuple):
    """One call of a detector.

    Attributes:
        entered: regions of the batch that entered each stage.
        milliseconds: of the whole batch.
        masks: of the batch.
        mask_milliseconds: the part of them in the mask heads.
        gates: the part of them at each gate, before stage 0 and after each stage but the last.
        tiles: of the finest map; 0 without a tile gate.
        tile_work: the same by ``TILE_WORK``; in a batch of several images in part estimated.
        map_milliseconds: the part of ``milliseconds`` in the backbone, the RPN and tiles.
    """

    entered: tuple[int, ...]
    milliseconds: float
    masks: int = 0
    mask_milliseconds: float = 0.0
    gates: tuple[float, ...] = ()
    tiles: int = 0
    tile_work: tuple[float, ...] = ()
    map_milliseconds: float = 0.0


def time_policies(
    detector: CascadeDetector,
    batches: Sequence[Batch],
    policies: Mapping[str, ExitPolicy | None],
    *,
    rounds: int,
) -> dict[str, list[Timing]]:
    """Time the detector with every policy in turn, so that noise affects all of them equally.

    Args:
        detector: keeps its exits.
        batches: to run on; the first is run once more before, untimed.
        policies: by name.
        rounds: how often each batch is run with each policy.

    Returns:
        The calls of each policy, in order.
    """
    assert isinstance(detector, nn.Module)
    device = next(detector.parameters()).device
    timings: dict[str, list[Timing]] = {name: [] for name in policies}
    own = detector.cascade.exits
    calls = len(policies) * (1 + len(batches) * rounds)
    try:
        with (
            progress_bar("Measuring calls", calls) as step,
            evaluation_mode(detector),
            torch.no_grad(),
        ):
            for exits in policies.values():
                detector.set_exits(exits)
                detector.detect(batches[0])
                step()
            for batch in [*batches] * rounds:
                for name, exits in policies.items():
                    detector.set_exits(exits)
                    timer = PartTimer(device)
                    stats = detector.detect(batch, timer=timer).stats
                    milliseconds, of_masks = timer.milliseconds, timer.milliseconds.get("masks", 0)
                    total = sum(milliseconds.values())
                    gates = (milliseconds.get(f"gate{g}", 0.0) for g in range(len(stats.entered)))
                    timing = Timing(
                        tuple(stats.entered),
                        total,
                        stats.masks,
                        of_masks,
                        tuple(gates),
                        stats.tiles,
                        _tile_work(stats),
                        sum(milliseconds.get(name, 0.0) for name in _MAP_PARTS),
                    )
                    timings[name].append(timing)
                    step()
    finally:
        detector.set_exits(own)
    return timings


def fit_latency(
    detector: CascadeDetector,
    batches: Sequence[Batch],
    *,
    most_proposals: int,
    rounds: int,
    tile_thresholds: Sequence[float] = (),
) -> LatencyModel:
    """Measure a detector with more and fewer regions, and fit a model to the medians.

    Args:
        detector: in either host.
        batches: to run on, of equal size.
        most_proposals: of an image.
        rounds: how often each batch is run with each number of regions.
        tile_thresholds: of a detector with a tile gate, 0 first; none for one without.
    """
    stages = detector.cascade.num_stages
    policies: dict[str, ExitPolicy | None] = {**truncated_cascades(stages)}
    for first, later in _SHARES:
        shares = (first, *[later] * (stages - 1))
        budget = tuple(max(1, round(share * most_proposals)) for share in shares)
        policies[str(budget)] = ExitPolicy(num_stages=stages, region_budget=budget)
    for threshold in tile_thresholds[2::2]:  # a few are enough
        for share in _GATED_SHARES:
            limit = max(1, round(share * most_proposals))
            policies[f"{threshold} {share}"] = ExitPolicy(
                num_stages=stages, region_budget=(limit,) * stages, tile_threshold=threshold
            )
    timings = time_policies(detector, batches, policies, rounds=rounds)
    same = [
        calls[index :: len(batches)] for calls in timings.values() for index in range(len(batches))
    ]
    return LatencyModel.fit(
        np.array([calls[0].entered for calls in same]),
        np.array([median(call.milliseconds for call in calls) for calls in same]),
        masks=np.array([calls[0].masks for calls in same]),
        mask_milliseconds=np.array([median(c.mask_milliseconds for c in calls) for calls in same]),
        device_name=device_name(next(detector.parameters()).device),
        batch_size=len(batches[0]),
        tiles=_tiles_of(timings.values(), len(batches)),
        map_milliseconds=np.array([median(c.map_milliseconds for c in calls) for calls in same]),
    )


def _tile_work(stats: CascadeStats) -> tuple[float, ...]:
    """Tiles by ``TILE_WORK``."""
    dense, whole = stats.tiles_dense, stats.tiles_whole - stats.tiles_dense
    opened, others = stats.tiles_open - dense, stats.tiles - dense
    # Of images that are not computed as a whole, if all have as many open tiles.
    in_tiles = opened * (1 - whole / others) if others else 0.0
    later = max(stats.tiles_computed - dense - whole - in_tiles, 0.0)
    return float(dense), float(opened), later, float(whole)


def _tiles_of(timings: Iterable[Sequence[Timing]], batches: int) -> npt.NDArray[np.float64] | None:
    """Tiles by ``TILE_WORK`` of each policy on each batch; ``None`` if no policy has a gate."""
    calls = [own[:batches] for own in timings]
    whole = [max(tiles) for tiles in zip(*([c.tiles for c in own] for own in calls), strict=True)]
    if not any(whole):
        return None
    # Without a gate a call computes all that one with an open gate does.
    return np.array(
        [
            call.tile_work if call.tiles else (tiles, 0, 0, 0)
            for own in calls
            for call, tiles in zip(own, whole, strict=True)
        ]
    )


def first_batches(loader: Iterable[Batch], count: int) -> list[Batch]:
    """The first batches of a loader that are as large as the first one, to be run repeatedly."""
    batches = list(islice(loader, count))
    return [batch for batch in batches if len(batch) == len(batches[0])]
