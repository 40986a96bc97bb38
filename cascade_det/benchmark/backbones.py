"""Trunks with their necks, and whole models with exits, beside those with ResNet-50-FPN.

All weights and images are drawn. Every backbone is measured as built, optimised in float32 and,
where the machine has instructions for it, in bfloat16; each against ResNet-50-FPN in the same
setting.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cascade_det import config
from cascade_det.benchmark.comparison import region_counts, take_turns
from cascade_det.benchmark.memory import Call, peak_memory
from cascade_det.benchmark.models import BenchmarkModel, Standalone, why_no_detectron2
from cascade_det.benchmark.options import Options
from cascade_det.benchmark.setup import Setup
from cascade_det.benchmark.timing import ratio, spread
from cascade_det.benchmark.work import PartCounter
from cascade_det.data.samples import Sample
from cascade_det.engine.allocator import keep_freed_memory
from cascade_det.engine.devices import has_bfloat16
from cascade_det.model_zoo import get_config_file
from cascade_det.standalone import Detector, build_detector
from cascade_det.standalone.optimize import optimize

logger = logging.getLogger(__name__)

REFERENCE = "ResNet-50-FPN"
PEER = f"Detectron2's {REFERENCE}"
PLAIN = "plain"
# Settings and the types they compute in.
FAST = {"optimised": torch.float32, "bfloat16": torch.bfloat16}

_BASE = "Base-Cascade-RCNN-FPN.yaml"
_DRAWN = ("MODEL.WEIGHTS", "", "MODEL.MASK_ON", "False")
# A shipped configuration, and keys and values on top.
Recipe = tuple[str, tuple[str, ...]]
REFERENCE_RECIPE: Recipe = (_BASE, ())
RECIPES: dict[str, Recipe] = {
    "EfficientViT-M4": ("COCO-Detection/cascade_rcnn_EfficientViT_M4_FPN_1x.yaml", ()),
    "EfficientViT-M0": ("COCO-Detection/cascade_rcnn_EfficientViT_M0_FPN_1x.yaml", ()),
    "HAT-Net tiny": ("COCO-Detection/cascade_rcnn_HATNet_tiny_FPN_1x.yaml", ()),
    "HierViT": ("COCO-Detection/cascade_rcnn_HierViT_FPN_1x.yaml", ()),
    "MobileNetV2": (_BASE, ("MODEL.BACKBONE.NAME", "build_mobilenet_v2_fpn_backbone")),
}


@dataclass
class Backbone:
    """A trunk with its neck in one setting, for inference.

    Attributes:
        kind: ``REFERENCE``, ``PEER``, a key of ``RECIPES``, or ``MODEL.BACKBONE.NAME``.
        setting: ``PLAIN``, or a key of ``FAST``.
        module: images to maps by name.
        inputs: normalised and padded images ``[N, 3, H, W]`` as the detector makes them, by N.
        keeps_memory: see ``BenchmarkModel``.
        whole: its detector with exits, of those that are optimised.
    """

    kind: str
    setting: str
    module: nn.Module
    inputs: Mapping[int, Tensor]
    keeps_memory: bool = False
    whole: BenchmarkModel | None = None

    @property
    def name(self) -> str:
        """Kind and setting."""
        return _named(self.kind, self.setting)

    def run(self, images: int) -> dict[str, Tensor]:
        """The maps of a batch of so many images."""
        with torch.inference_mode():
            maps: dict[str, Tensor] = self.module(self.inputs[images])
            return maps


def measure_backbones(options: Options, left_out: dict[str, str]) -> list[dict[str, Any]]:
    """Compare trunks with necks, and whole models with exits, for each batch size.

    These are the backbone of the configuration if it is another than ``REFERENCE``, else those of
    ``RECIPES``, and Detectron2's own ``REFERENCE``.

    Args:
        options: ``proposals`` of whole models are the first ones; ``contenders`` do not count.
        left_out: gets the reasons for what cannot run here, by name.

    Returns:
        Per batch size ``batch``; ``contenders``, see ``_compare``; ``ratios`` as of other
        comparisons, each against ``REFERENCE`` in the same setting; and ``whole``, see
        ``_compare_whole``.

    Raises:
        ConfigError: see ``Setup``.
    """
    setups = open_setups(options)
    backbones = open_backbones(setups, left_out)
    setup = setups[REFERENCE]
    return [
        {
            **_compare(setups, backbones, images),
            "whole": _compare_whole(setup, backbones, images),
        }
        for images in options.batches
    ]


def open_setups(options: Options) -> dict[str, Setup]:
    """What each kind of backbone is built of, ``REFERENCE`` first."""
    reference = _setup(options, *REFERENCE_RECIPE)
    configured = Setup(replace(options, opts=(*options.opts, *_DRAWN)))
    if config.backbone_arguments(configured.cfg) != config.backbone_arguments(reference.cfg):
        others = {configured.cfg.MODEL.BACKBONE.NAME: configured}
    else:
        others = {kind: _setup(options, *recipe) for kind, recipe in RECIPES.items()}
    return {REFERENCE: reference, **others}


def _setup(options: Options, name: str, opts: Sequence[str]) -> Setup:
    files = (get_config_file(name),)
    return Setup(replace(options, config_file=files, opts=(*opts, *_DRAWN)))


def open_backbones(setups: Mapping[str, Setup], left_out: dict[str, str]) -> list[Backbone]:
    """Build all backbones in all settings that run here, by setting, ``REFERENCE`` first.

    Args:
        setups: see ``open_setups``.
        left_out: gets the reasons for the others.
    """
    settings = dict(FAST)
    if not has_bfloat16(setups[REFERENCE].device):
        del settings["bfloat16"]
        left_out["backbones in bfloat16"] = "this device has no instructions for it"
    found = []
    for kind, setup in setups.items():
        found.append(_open(kind, PLAIN, setup, setup.build_ours()))
        if kind == REFERENCE:
            if reason := why_no_detectron2():
                left_out[PEER] = reason
            else:
                from cascade_det.benchmark.detectron2_peer import build_backbone

                found.append(replace(found[0], kind=PEER, module=build_backbone(setup)))
        for setting, dtype in settings.items():
            arguments = setup.fast_arguments() | {"dtype": str(dtype).removeprefix("torch.")}
            found.append(_open(kind, setting, setup, optimize(setup.build_ours(), **arguments)))
        del setup.weights  # as large as a detector
    return sorted(found, key=lambda backbone: [PLAIN, *FAST].index(backbone.setting))


def _open(kind: str, setting: str, setup: Setup, detector: Detector) -> Backbone:
    inputs = {images: _inputs(detector, setup, images) for images in setup.options.batches}
    if setting == PLAIN:
        return Backbone(kind, setting, detector.backbone, inputs)
    adapter = Standalone(detector)
    adapter.limit_proposals(setup.options.proposals[0])
    on_cpu = setup.device.type == "cpu"
    whole = BenchmarkModel(adapter, setup.device, keeps_memory=on_cpu, exits=setup.exits[0])
    return Backbone(kind, setting, detector.backbone, inputs, on_cpu, whole)


def _inputs(detector: Detector, setup: Setup, images: int) -> Tensor:
    batch: Sequence[Sample] = setup.batches(images)[0]
    return detector.preprocess([sample["image"] for sample in batch])[0]


def _compare(
    setups: Mapping[str, Setup], backbones: Sequence[Backbone], images: int
) -> dict[str, Any]:
    """Times of trunks with necks, and their sizes.

    Returns:
        ``batch``; ``ratios``; ``contenders``, by name: ``kind``, ``setting``, ``ms_per_image``;
        of those that are not a plain one of ours ``difference``, the largest norm of the
        difference of a map from ours, plain, as a share of its norm; of plain ones of ours
        ``parameters``, ``multiply_adds`` and ``input`` (height, width) of an image, and
        ``training_memory``, the peak of forward and backward pass of a batch above the model.
    """
    by_name = {backbone.name: backbone for backbone in backbones}
    contenders: dict[str, dict[str, Any]] = {}
    for name, backbone in by_name.items():
        own = {"kind": backbone.kind, "setting": backbone.setting}
        if backbone.kind in setups and backbone.setting == PLAIN:
            setup = setups[backbone.kind]
            contenders[name] = own | _sizes(backbone, images) | _training_memory(setup, images)
        else:
            plain = by_name[_named(REFERENCE if backbone.kind == PEER else backbone.kind, PLAIN)]
            difference = _difference(backbone.run(images), plain.run(images))
            contenders[name] = own | {"difference": difference}
    calls = {name: partial(_run, backbone, images) for name, backbone in by_name.items()}
    setup = setups[REFERENCE]
    times = take_turns(setup, by_name, calls, setup.options.warmup)
    for name, samples in times.items():
        contenders[name]["ms_per_image"] = spread([time / images for time in samples])
    return {"batch": images, "contenders": contenders, "ratios": _ratios(by_name, times)}


def _compare_whole(setup: Setup, backbones: Sequence[Backbone], images: int) -> dict[str, Any]:
    """Times of optimised detectors with the same exits, with as many regions from each RPN.

    Returns:
        As other comparisons of whole models.
    """
    by_name = {backbone.name: backbone for backbone in backbones if backbone.whole is not None}
    batch = setup.batches(images)[0]
    calls = {name: partial(_run_whole, backbone, batch) for name, backbone in by_name.items()}
    contenders = {}
    for name, backbone in by_name.items():
        assert backbone.whole is not None
        contenders[name] = region_counts(backbone.whole.adapter.output(calls[name](0)), images)
    times = take_turns(setup, by_name, calls, setup.options.warmup)
    for name, samples in times.items():
        contenders[name]["ms_per_image"] = spread([time / images for time in samples])
    return {
        "batch": images,
        "proposals": setup.options.proposals[0],
        "contenders": contenders,
        "ratios": _ratios(by_name, times),
    }


def _run(backbone: Backbone, images: int, number: int) -> object:
    return backbone.run(images)


def _run_whole(backbone: Backbone, batch: Sequence[Sample], number: int) -> Any:
    assert backbone.whole is not None
    return backbone.whole.run(backbone.whole.adapter.whole, batch)


def _named(kind: str, setting: str) -> str:
    return f"{kind}, {setting}"


def _ratios(
    backbones: Mapping[str, Backbone], times: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    return [
        {"what": name, "against": against, "ratio": ratio(times[against], times[name])}
        for name, backbone in backbones.items()
        if (against := _named(REFERENCE, backbone.setting)) != name
    ]


@torch.no_grad()
def _sizes(backbone: Backbone, images: int) -> dict[str, Any]:
    counter, inputs = PartCounter(), backbone.inputs[images]
    with counter.part("backbone"):
        backbone.module(inputs)
    return {
        "parameters": sum(parameter.numel() for parameter in backbone.module.parameters()),
        "multiply_adds": counter.work()["backbone"].multiply_adds / images,
        "input": list(inputs.shape[-2:]),
    }


def _difference(maps: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> float:
    return max(
        float((maps[name].float() - wanted).norm() / wanted.norm())
        for name, wanted in plain.items()
    )


def _training_memory(setup: Setup, images: int) -> dict[str, int]:
    options = setup.options
    build = partial(_build_step, options, images)
    peak = peak_memory(build, device=options.device, threads=options.threads)
    return {"training_memory": peak["above_model"]}


def _build_step(options: Options, images: int) -> Call:
    """Forward and backward pass of a trunk with its neck, as in training."""
    setup = Setup(options)
    detector = build_detector(setup.cfg).train()
    inputs = _inputs(detector, setup, images)
    if setup.device.type == "cpu":
        keep_freed_memory()
        inputs = inputs.contiguous(memory_format=detector.training_format)
    backbone: Callable[..., dict[str, Tensor]] = detector.backbone
    parameters = list(detector.backbone.parameters())

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        torch.stack([x.mean() for x in backbone(inputs).values()]).sum().backward()

    return step
