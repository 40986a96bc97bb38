"""What all models share: configuration, weights, images, regions, exits and device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F

from cascade_det import config
from cascade_det.benchmark.options import Options, Survivors
from cascade_det.benchmark.weights import seeded_weights
from cascade_det.core import Detections, ExitPolicy
from cascade_det.data.samples import Sample
from cascade_det.engine.datasets import load_datasets_to_evaluate
from cascade_det.engine.devices import resolve_device, resolve_fast_dtype
from cascade_det.errors import ConfigError
from cascade_det.standalone import Detector, build_detector
from cascade_det.standalone.evaluate import test_loader
from cascade_det.weights import load_weights

# At these thresholds the rules are computed but remove no region.
_NEVER_BACKGROUND = 1e-30
_NEVER_REDUNDANT = 1.0
_SMALLEST_SIDE = 16.0  # pixels of a random box
_LARGEST_SHARE = 0.6  # of the shorter image side
_OBJECTS = 8  # per training image

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Regions:
    """Proposals of a batch.

    Attributes:
        boxes: per image float32 ``[R, 4]``, XYXY pixels, by descending objectness.
        objectness: per image float32 ``[R]``, logits.
    """

    boxes: list[Tensor]
    objectness: list[Tensor]


class Setup:
    """What all models share.

    Args:
        options: what to measure.

    Attributes:
        cfg: configuration of the standalone host, with the device of the options.
        device: of all models.
        trained: whether ``MODEL.WEIGHTS`` is set; without it, weights are random.

    Raises:
        ConfigError: the configuration contradicts itself, the device does not exist, or the
            number of survivors is not the number of stages.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.cfg = read_config(options)
        config.check_config(self.cfg)
        self.device = resolve_device(self.cfg)
        self.trained = bool(self.cfg.MODEL.WEIGHTS)
        self._batches: dict[int, list[list[Sample]]] = {}
        stages = len(self.cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
        if not self.trained and len(options.survivors.per_stage) != stages:
            raise ConfigError(
                f"--survivors: {len(options.survivors.per_stage)} numbers, but "
                f"MODEL.ROI_BOX_CASCADE_HEAD.IOUS has {stages} stages: give {stages}."
            )

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The state dict of all models of this architecture, on the CPU.

        Raises:
            CheckpointError: ``MODEL.WEIGHTS`` cannot be read, or is not a complete detector.
        """
        cfg = config.changed(self.cfg, "MODEL.DEVICE", "cpu")
        if not self.trained:
            seed = self.options.seed
            return seeded_weights(cfg, draw_sample(self.options.size, seed)["image"], seed)
        detector = build_detector(cfg)
        load_weights(detector, self.cfg.MODEL.WEIGHTS, complete=True)
        return detector.state_dict()

    def place(self, model: Model) -> Model:
        """A model with its weights, where it is measured: it is built on the device."""
        return model

    def build_ours(self) -> Detector:
        """Build a standalone detector with the weights, for inference, exits off."""
        detector = build_detector(self.cfg).eval()
        detector.load_state_dict(self.weights)
        detector.set_exits(None)
        return self.place(detector)

    def fast_arguments(self) -> dict[str, Any]:
        """The arguments of ``optimize`` that the configuration gives."""
        arguments = config.fast_arguments(
            config.changed(self.cfg, "MODEL.CASCADE.FAST.ENABLED", True)
        )
        assert arguments is not None
        return arguments

    @property
    def fast_dtype(self) -> torch.dtype:
        """The floating-point type in which optimised heads compute."""
        arguments = self.fast_arguments()
        if "roi_heads" in arguments["float32_parts"]:
            return torch.float32
        dtype = arguments["dtype"]
        return resolve_fast_dtype("auto" if dtype == "int8" else dtype, self.device)

    @cached_property
    def fast_images(self) -> list[list[Sample]] | None:
        """The images that ``optimize`` measures the ranges of int8 with: those of the benchmark.

        No others are at hand with random weights, and the time does not depend on them.
        """
        return self.batches(1) if self.fast_arguments()["dtype"] == "int8" else None

    @cached_property
    def exits(self) -> tuple[ExitPolicy | None, str]:
        """The exit policy of models with exits, ``None`` for no exits; and its description.

        Trained weights use the exits of the configuration. On random weights these would decide
        by chance, so as many regions enter each stage as in a trained model.
        """
        if not self.trained:
            return replayed_exits(self.options.survivors), _describe(self.options.survivors)
        detector = build_detector(self.cfg).eval()
        if detector.roi_heads.exits is None:
            return None, "MODEL.CASCADE.EXIT.ENABLED is False in the configuration"
        detector.load_state_dict(self.weights)
        return detector.roi_heads.exits, config.exit_summary(self.cfg)

    def batches(self, size: int) -> list[list[Sample]]:
        """Batches of ``size`` images: from the test set if weights are trained, else random.

        Raises:
            ConfigError: weights are trained, but there is no test set.
            DatasetError: it cannot be read.
        """
        if size not in self._batches:
            if self.trained:
                wanted = self.options.images * size
                images = list(itertools.islice(itertools.cycle(self._test_images), wanted))
            else:
                seed = self.options.seed
                images = [draw_sample(self.options.size, seed + number) for number in range(size)]
            self._batches[size] = in_batches(images, size)
        return self._batches[size]

    def training_batch(self, size: int) -> list[Sample]:
        """Random images with objects of random classes, for a training step."""
        batch = []
        for seed in range(self.options.seed, self.options.seed + size):
            sample = draw_sample(self.options.size, seed)
            generator = torch.Generator().manual_seed(seed)
            sample["gt_boxes"] = draw_boxes(_OBJECTS, sample["image"].shape[-2:], generator)
            classes = self.cfg.MODEL.ROI_HEADS.NUM_CLASSES
            sample["gt_classes"] = torch.randint(classes, (_OBJECTS,), generator=generator)
            batch.append(sample)
        return batch

    def regions(self, batch: Sequence[Sample], count: int) -> Regions:
        """Exactly ``count`` random regions per image.

        With trained weights, the best proposals of our RPN instead, at most ``count`` of them.
        """
        if self.trained:
            inputs = self._reference.cascade_inputs(batch)
            assert inputs.objectness is not None
            return Regions(
                [boxes[:count] for boxes in inputs.proposals],
                [logits[:count] for logits in inputs.objectness],
            )
        boxes, objectness = [], []
        for seed, sample in enumerate(batch, self.options.seed):
            generator = torch.Generator().manual_seed(seed)
            boxes.append(draw_boxes(count, sample["image"].shape[-2:], generator))
            logits = torch.randn(count, generator=generator)
            objectness.append(logits.sort(descending=True).values)
        return Regions([x.to(self.device) for x in boxes], [x.to(self.device) for x in objectness])

    def detections(self, batch: Sequence[Sample], count: int) -> list[Detections]:
        """Exactly ``count`` random detections per image.

        With trained weights those of our cascade instead, without exits, at most ``count``.
        """
        if self.trained:
            found, _ = self._reference.cascade.detect(**vars(self._reference.cascade_inputs(batch)))
            return [detections[:count] for detections in found]
        regions, classes = self.regions(batch, count), self.cfg.MODEL.ROI_HEADS.NUM_CLASSES
        drawn = []
        for seed, (boxes, logits) in enumerate(
            zip(regions.boxes, regions.objectness, strict=True), self.options.seed
        ):
            generator = torch.Generator().manual_seed(seed)
            own = torch.randint(classes, (count,), generator=generator).to(self.device)
            drawn.append(Detections(boxes, logits.sigmoid(), own, torch.zeros_like(own)))
        return drawn

    @cached_property
    def _reference(self) -> Detector:
        detector = self.build_ours()
        rpn = detector.proposal_generator
        rpn.post_nms_topk = (rpn.post_nms_topk[0], max(self.options.proposals))
        return detector

    @cached_property
    def _test_images(self) -> list[Sample]:
        dataset = load_datasets_to_evaluate(self.cfg, resume=False)[0]
        cfg = config.changed(self.cfg, "CASCADE.TEST_IMS_PER_BATCH", 1, "DATALOADER.NUM_WORKERS", 0)
        wanted = self.options.images * max(self.options.batches)
        loader = itertools.islice(test_loader(cfg, dataset), wanted)
        return [sample for batch in loader for sample in batch]


def read_config(options: Options) -> CfgNode:
    """The configuration of the standalone host with the device of the options; not checked."""
    # Without an index, a missing GPU would only be a warning.
    device = "cuda:0" if options.device == "cuda" else options.device
    return config.load_config(list(options.config_file), [*options.opts, "MODEL.DEVICE", device])


def draw_sample(size: tuple[int, int], seed: int) -> Sample:
    """An image of smooth blocks with noise: uint8 ``[3, *size]``."""
    generator = torch.Generator().manual_seed(seed)
    blocks = 200 * torch.rand(1, 3, 12, 16, generator=generator)
    image = F.interpolate(blocks, size, mode="bilinear")[0]
    image = (image + 55 * torch.rand(image.shape, generator=generator)).to(torch.uint8)
    return {"image": image, "height": size[0], "width": size[1]}


def in_batches(images: Sequence[Sample], size: int) -> list[list[Sample]]:
    """Consecutive batches of ``size`` images."""
    return [list(images[start : start + size]) for start in range(0, len(images), size)]


def replayed_exits(survivors: Survivors) -> ExitPolicy:
    """Exits that let the recorded number of regions into each stage: the most confident ones.

    Only budgets remove regions. The rules for background and redundancy run too, at thresholds
    that remove nothing, so that the measured time includes them.
    """
    stages = len(survivors.per_stage)
    return ExitPolicy(
        num_stages=stages,
        proposal_threshold=_NEVER_BACKGROUND,
        prune_thresholds=(_NEVER_BACKGROUND,) * (stages - 1),
        redundancy_iou=_NEVER_REDUNDANT,
        region_budget=survivors.budgets,
    )


def draw_boxes(count: int, size: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random boxes ``[count, 4]`` (XYXY) inside an image, with log-uniform side lengths.

    Args:
        count: of boxes.
        size: (height, width) of the image in pixels.
        generator: on the CPU.
    """
    height, width = size
    largest = max(_LARGEST_SHARE * min(height, width), _SMALLEST_SIDE + 1)
    low, high = math.log(min(_SMALLEST_SIDE, min(height, width) / 4)), math.log(largest)
    sides = torch.exp(low + (high - low) * torch.rand(count, 1, generator=generator))
    aspect = 2 ** (torch.rand(count, 1, generator=generator) - 0.5)
    sides = torch.cat((sides * aspect, sides / aspect), dim=1)
    limits = torch.tensor([width, height], dtype=torch.float32)
    sides = torch.minimum(sides, limits)
    corners = torch.rand(count, 2, generator=generator) * (limits - sides)
    return torch.cat((corners, corners + sides), dim=1)


def _describe(survivors: Survivors) -> str:
    counts = ", ".join(f"{count:g}" for count in survivors.per_stage)
    return (
        f"replayed: {counts} regions of an image enter stages 0 to {len(survivors.per_stage) - 1}, "
        f"from {survivors.origin}; the rules for background and redundancy run too, at thresholds "
        "that remove nothing. Regions that leave by a budget are reported here; real exits mostly "
        "drop them"
    )
