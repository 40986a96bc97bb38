"""Segmenters in turn on the same images: ours, torchvision's, and Detectron2's head."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from cascade_det import config
from cascade_det.benchmark.comparison import (
    call_in_turn,
    is_ours,
    part_spreads,
    take_turns,
    times_and_ratios,
)
from cascade_det.benchmark.models import why_no_detectron2
from cascade_det.benchmark.options import Options
from cascade_det.benchmark.segmenter_peers import build_detectron2, build_torchvision
from cascade_det.benchmark.setup import draw_sample, in_batches, read_config
from cascade_det.benchmark.timing import ratio
from cascade_det.core import PartTimer
from cascade_det.data.samples import Sample
from cascade_det.engine.devices import resolve_device
from cascade_det.engine.semantic_datasets import (
    load_semantic_datasets_to_evaluate,
    semantic_test_loader,
)
from cascade_det.standalone.build_segmenter import build_one_scale
from cascade_det.standalone.optimize import optimize_segmenter
from cascade_det.standalone.segmenter import SemanticSegmentor
from cascade_det.weights import load_weights

PLAIN = "ours"


@dataclass
class SegmenterModel:
    """A segmenter in one of its settings.

    Attributes:
        segment: a batch to logits ``[K, height, width]`` of each image; with a timer, it gets the
            milliseconds of the parts.
        device: of the model.
        keeps_memory: see ``BenchmarkModel``.
    """

    segment: Callable[..., list[Tensor]]
    device: torch.device
    keeps_memory: bool = False

    def parts(self, batch: Sequence[Sample]) -> dict[str, float]:
        """Milliseconds of a batch by part."""
        timer = PartTimer(self.device)
        self.segment(batch, timer=timer)
        return timer.milliseconds


class SegmenterSetup:
    """What all segmenters share.

    Args:
        options: what to measure.

    Attributes:
        cfg: configuration of the standalone host, with the device of the options.
        device: of all models.
        trained: whether ``MODEL.WEIGHTS`` is set; without it, weights and images are drawn.

    Raises:
        ConfigError: the configuration contradicts itself, or the device does not exist.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.cfg = read_config(options)
        config.check_config(self.cfg)
        self.device = resolve_device(self.cfg)
        self.trained = bool(self.cfg.MODEL.WEIGHTS)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The state dict of all settings of ours.

        Raises:
            CheckpointError: ``MODEL.WEIGHTS`` cannot be read, or is not a complete segmenter.
        """
        with torch.random.fork_rng():
            torch.manual_seed(self.options.seed)
            segmenter = build_one_scale(self.cfg)
        if self.trained:
            load_weights(segmenter, self.cfg.MODEL.WEIGHTS, complete=True)
        return segmenter.state_dict()

    def build_ours(self, *, exits: bool = False) -> SemanticSegmentor:
        """A segmenter with the weights, for inference."""
        segmenter = build_one_scale(self.cfg).eval()
        segmenter.load_state_dict(self.weights)
        if not exits:
            segmenter.sem_seg_head.set_exits(None)
        return segmenter

    def batches(self, size: int) -> list[list[Sample]]:
        """Batches of ``size`` images: from the test set if weights are trained, else drawn.

        Raises:
            ConfigError: weights are trained, but there is no test set.
            DatasetError: it cannot be read.
        """
        options = self.options
        if not self.trained:
            seeds = range(options.seed, options.seed + size)
            return [[draw_sample(options.size, seed) for seed in seeds]]
        images = itertools.islice(itertools.cycle(self._test_images), options.images * size)
        return in_batches(list(images), size)

    @cached_property
    def _test_images(self) -> list[Sample]:
        dataset = load_semantic_datasets_to_evaluate(self.cfg, resume=False)[0]
        cfg = config.changed(self.cfg, "CASCADE.TEST_IMS_PER_BATCH", 1, "DATALOADER.NUM_WORKERS", 0)
        wanted = self.options.images * max(self.options.batches)
        loader = semantic_test_loader(cfg, dataset)
        return [sample for (sample,) in itertools.islice(loader, wanted)]


def open_segmenters(
    setup: SegmenterSetup, names: Sequence[str]
) -> tuple[dict[str, SegmenterModel], dict[str, str]]:
    """Build the segmenters that run here.

    Args:
        setup: what all segmenters share.
        names: from ``options.SEGMENTERS``.

    Returns:
        The models, and the reasons why the others cannot run, both by name.
    """
    opened: dict[str, SegmenterModel] = {}
    left_out: dict[str, str] = {}
    for name in names:
        if reason := _why_not(name, setup):
            left_out[name] = reason
        elif is_ours(name):
            opened[name] = _open_ours(name, setup)
        else:
            with torch.random.fork_rng():
                torch.manual_seed(setup.options.seed)
                opened[name] = _open_peer(name, setup)
    return opened, left_out


def _why_not(name: str, setup: SegmenterSetup) -> str:
    """Why a segmenter cannot run; empty if it can."""
    if name.endswith("-exits"):
        if not setup.cfg.MODEL.CASCADE_DECODER.EXIT.ENABLED:
            return "MODEL.CASCADE_DECODER.EXIT.ENABLED is False in the configuration"
        if not setup.trained:
            return "MODEL.WEIGHTS is empty, and on drawn weights exits would decide by chance"
    return why_no_detectron2() if name.startswith("detectron2") else ""


def _open_ours(name: str, setup: SegmenterSetup) -> SegmenterModel:
    segmenter, is_fast = setup.build_ours(exits=name.endswith("-exits")), "-fast" in name
    if is_fast:
        optimize_segmenter(segmenter)

    def segment(batch: Sequence[Sample], timer: PartTimer | None = None) -> list[Tensor]:
        return segmenter.segment(batch, timer=timer).sem_seg

    keeps_memory = is_fast and setup.device.type == "cpu"
    return SegmenterModel(segment, setup.device, keeps_memory)


def _open_peer(name: str, setup: SegmenterSetup) -> SegmenterModel:
    num_classes, like = setup.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, setup.build_ours()
    peer = (
        build_detectron2(num_classes, like)
        if name.startswith("detectron2")
        else build_torchvision(name, num_classes, like)
    )
    return SegmenterModel(peer.segment, setup.device)


def compare_whole(
    setup: SegmenterSetup, models: Mapping[str, SegmenterModel], images: int
) -> dict[str, Any]:
    """Compare whole segmenters, images to logits.

    Returns:
        ``batch``; ``contenders`` and ``ratios`` as of detectors, with the ratios of our settings
        to the plain one; and ``labels``: by setting of ours, the share of pixels with the class
        of the plain one, and the largest difference of logits as a share of its largest.
    """
    batches = setup.batches(images)
    calls = {name: call_in_turn(model.segment, batches) for name, model in models.items()}
    times = take_turns(setup, models, calls, setup.options.warmup)
    results = times_and_ratios(times, images)
    own = [name for name in models if is_ours(name) and name != PLAIN and PLAIN in models]
    results["ratios"] += [
        {"what": name, "against": PLAIN, "ratio": ratio(times[PLAIN], times[name])} for name in own
    ]
    labels = {name: _agreement(models[name], models[PLAIN], batches) for name in own}
    return {"batch": images, **results, "labels": labels}


def compare_parts(
    setup: SegmenterSetup, models: Mapping[str, SegmenterModel], images: int
) -> dict[str, Any]:
    """Time the parts of whole segmenters: ``batch``, and ``contenders`` as of detectors."""
    batches = setup.batches(images)
    calls = {name: call_in_turn(model.parts, batches) for name, model in models.items()}
    return {"batch": images, "contenders": part_spreads(setup, models, calls, images)}


def _agreement(
    model: SegmenterModel, plain: SegmenterModel, batches: Sequence[Sequence[Sample]]
) -> dict[str, float]:
    same = pixels = 0
    difference = largest = 0.0
    for batch in batches:
        for found, wanted in zip(model.segment(batch), plain.segment(batch), strict=True):
            equal = found.argmax(0) == wanted.argmax(0)
            same, pixels = same + int(equal.sum()), pixels + equal.numel()
            difference = max(difference, float((found - wanted).abs().max()))
            largest = max(largest, float(wanted.abs().max()))
    return {"same_class": same / pixels, "difference": difference / (largest or 1.0)}


def measurements(
    setup: SegmenterSetup, models: Mapping[str, SegmenterModel]
) -> dict[str, Callable[[], Any]]:
    """The measurements of segmenters, by name."""
    return {
        "whole": partial(_for_each_batch, compare_whole, setup, models),
        "parts": partial(_for_each_batch, compare_parts, setup, models),
    }


def _for_each_batch(
    compare: Callable[..., dict[str, Any]],
    setup: SegmenterSetup,
    models: Mapping[str, SegmenterModel],
) -> list[dict[str, Any]]:
    return [compare(setup, models, images) for images in setup.options.batches]
