"""Export of a detector of fixed depth to one file, for onnxruntime or ``torch.export.load``."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.fx.experimental import _config

from cascade_det.backbones import EfficientViT, HATNet, HierarchicalViT, PVTv2
from cascade_det.core import Detections
from cascade_det.core.modes import evaluation_mode
from cascade_det.errors import ConfigError
from cascade_det.onnx_predictor import (
    INPUTS,
    LONGEST_SIDE,
    METADATA_KEY,
    OUTPUTS,
    OUTPUTS_WITH_MASKS,
    ExportedModel,
    OnnxPredictor,
)
from cascade_det.standalone.detector import Detector
from cascade_det.standalone.fixed_depth import FixedDepthDetector

# Aligned RoIAlign needs 16; PyTorch's exporter was written for 18.
OPSET = 18
METADATA_FILE = f"{METADATA_KEY}.json"
_PACKAGES = {"onnx": ("onnx", "onnxruntime"), "torch-export": ()}
# Shape of the traced image. Its sides share no factor with a stride, so that no size becomes a
# constant.
EXAMPLE_SHAPE = (3, 150, 211)
# The same for a program, whose tracing computes no values; attention has several windows there.
PROGRAM_SHAPE = (3, 486, 597)
_WITH_ATTENTION = (EfficientViT, HATNet, HierarchicalViT, PVTv2)
_SMALLEST_WITH_ATTENTION = 128

# Image uint8 [3, H, W] to boxes [D, 4], scores [D], classes [D] and, with masks, masks [D, M, M].
ExportedDetector = Callable[[Tensor], tuple[Tensor, ...]]


def check_export(cfg: CfgNode, file_format: str) -> None:
    """Check what every export needs.

    Args:
        cfg: of a detector or a segmenter.
        file_format: "onnx" or "torch-export".

    Raises:
        ConfigError: a package or the weights are missing.
    """
    for package in _PACKAGES[file_format]:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"--format {file_format} needs {package}, which is not installed: pip install "
                f"{' '.join(_PACKAGES[file_format])}"
            )
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError("MODEL.WEIGHTS is empty: give the file of weights to export")


def stages_to_export(cfg: CfgNode, file_format: str, num_stages: int | None) -> int:
    """Check that an export can work, and return the number of stages to export.

    Args:
        cfg: of the detector.
        file_format: "onnx" or "torch-export".
        num_stages: as asked for; ``None`` for all, which is refused if exits are enabled.

    Raises:
        ConfigError: a package or the weights are missing, the cascade has fewer stages, another
            suppression than NMS, or exits that are enabled while ``num_stages`` is ``None``.
    """
    check_export(cfg, file_format)
    if (suppression := cfg.MODEL.CASCADE.SUPPRESSION) != "nms":
        raise ConfigError(
            f"MODEL.CASCADE.SUPPRESSION is {suppression!r}, but an exported file has NMS. Set it "
            "to nms."
        )
    available = len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
    if num_stages is None:
        if cfg.MODEL.CASCADE.EXIT.ENABLED and cfg.MODEL.ROI_HEADS.NAME != "CascadeROIHeads":
            raise ConfigError(
                "MODEL.CASCADE.EXIT.ENABLED is True, but an exported file has no exits: all "
                "regions run through the same stages. Give their number with --stages (1 to "
                f"{available}), or set the key to False to export all."
            )
        return available
    if not 1 <= num_stages <= available:
        raise ConfigError(
            f"--stages {num_stages}: MODEL.ROI_BOX_CASCADE_HEAD.IOUS has {available} stages. Give "
            f"a number from 1 to {available}."
        )
    return num_stages


def export_onnx(
    detector: Detector, path: str | os.PathLike[str], description: ExportedModel
) -> ExportedDetector:
    """Write an ONNX file that takes an image of any size.

    Args:
        detector: on the CPU, not optimised.
        path: of the file.
        description: written into the file; its ``num_stages`` are exported.

    Returns:
        A function that runs the file in onnxruntime.
    """
    model = FixedDepthDetector(detector, description.num_stages)
    outputs = OUTPUTS if detector.roi_heads.masks is None else OUTPUTS_WITH_MASKS
    axes = {name: {0: "detections"} for name in outputs}
    write_onnx(model, path, draw_image(EXAMPLE_SHAPE), axes, description.to_json())
    predictor = OnnxPredictor(path)
    return lambda image: tuple(torch.from_numpy(x) for x in predictor.run(image.numpy()))


def write_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example: Tensor,
    outputs: Mapping[str, Mapping[int, str]],
    description: str,
) -> None:
    """Write an ONNX file of a function of one image of any size.

    Args:
        model: an image ``[3, H, W]`` to its outputs.
        path: of the file.
        example: an image that is traced.
        outputs: the names of their axes that vary, by name.
        description: written into the file.
    """
    import onnx

    with evaluation_mode(model), torch.no_grad(), warnings.catch_warnings():
        # Warnings about intended constants and about this exporter being the old one. The new one
        # takes many times as long to write the same file.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (example,),
            os.fspath(path),
            input_names=list(INPUTS),
            output_names=list(outputs),
            dynamic_axes={"image": {1: "height", 2: "width"}, **outputs},
            opset_version=OPSET,
            dynamo=False,
        )
    content = onnx.load(path)
    onnx.helper.set_model_props(content, {METADATA_KEY: description})
    onnx.checker.check_model(content)
    onnx.save(content, path)


def export_program(
    detector: Detector, path: str | os.PathLike[str], description: ExportedModel
) -> ExportedDetector:
    """Write a ``.pt2`` file for ``torch.export.load``; arguments as in ``export_onnx``.

    Returns:
        A function that runs the file in PyTorch.
    """
    model = FixedDepthDetector(detector, description.num_stages)
    return write_program(model, path, draw_image(PROGRAM_SHAPE), description.to_json())


def write_program(
    model: nn.Module,
    path: str | os.PathLike[str],
    example: Tensor,
    description: str,
    *,
    smallest: int = 2,
) -> Callable[[Tensor], Any]:
    """Write a ``.pt2`` file of a function of one image.

    It takes images with sides of up to 65,536 px. The description is in ``cascade_det.json`` in it.

    Args:
        model: as in ``write_onnx``.
        path: of the file.
        example: as in ``write_onnx``.
        description: written into the file.
        smallest: side of an image in pixels, 2 or more; with attention in the model at least 128,
            since a map of a single window or row would need another program.

    Returns:
        A function that runs the file in PyTorch.
    """
    attends = any(isinstance(module, _WITH_ATTENTION) for module in model.modules())
    smallest = max(smallest, _SMALLEST_WITH_ATTENTION if attends else 2)
    sides = {
        axis: torch.export.Dim(name, min=smallest, max=LONGEST_SIDE)
        for axis, name in ((1, "height"), (2, "width"))
    }
    # Sizes that the example has or lacks, such as 1, are not told apart.
    sizes_alike = _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with evaluation_mode(model), torch.no_grad(), sizes_alike:
        program = torch.export.export(
            model,
            (example,),
            dynamic_shapes=(sides,),
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    torch.export.save(program, path, extra_files={METADATA_FILE: description})
    return torch.export.load(path).module()


@dataclass
class Comparison:
    """Differences between the detections of an exported file and of its detector.

    Attributes:
        num_detections: of the detector.
        num_exported: of the file.
        boxes: pixels; largest difference of a coordinate to the nearest detection of the same
            class; ``inf`` without one.
        scores: largest difference of scores to that detection.
        masks: largest difference of a cell of the mask to that detection's; ``None`` without masks.
    """

    num_detections: int
    num_exported: int
    boxes: float
    scores: float
    masks: float | None = None

    @property
    def same(self) -> bool:
        """Whether they agree up to rounding."""
        counts_agree = self.num_detections == self.num_exported
        return counts_agree and self.boxes < 0.05 and max(self.scores, self.masks or 0.0) < 1e-3


@torch.no_grad()
def compare(
    detector: Detector, exported: ExportedDetector, image: Tensor, num_stages: int
) -> Comparison:
    """Compare an exported file with its detector on an image, uint8 ``[3, H, W]``."""
    wanted = _detect(detector, image, num_stages)
    boxes, scores, classes, *rest = exported(image)
    if len(boxes) == 0 or len(wanted) == 0:
        distance = 0.0 if len(boxes) == len(wanted) else float("inf")
        return Comparison(len(wanted), len(boxes), distance, distance)
    distances = (wanted.boxes[:, None] - boxes).abs().amax(dim=2)
    distances[wanted.classes[:, None] != classes] = torch.inf
    score_gaps = (wanted.scores[:, None] - scores).abs()
    # The nearest detection of the detector for each of the file, and the reverse.
    nearest = [distances.min(dim=axis, keepdim=True) for axis in (0, 1)]
    box_distance = torch.stack([found.values.max() for found in nearest]).max()

    def largest(gaps: Tensor) -> float:
        return max(float(gaps.gather(i, near.indices).max()) for i, near in enumerate(nearest))

    comparison = Comparison(len(wanted), len(boxes), float(box_distance), largest(score_gaps))
    if wanted.masks is not None:
        gaps = torch.stack([(mask - rest[0]).abs().amax(dim=(1, 2)) for mask in wanted.masks])
        comparison.masks = largest(gaps)
    return comparison


def _detect(detector: Detector, image: Tensor, num_stages: int) -> Detections:
    """The detections after a stage, with masks if there are any."""
    stages = detector.detect([{"image": image}], stages=True).stages
    assert stages is not None
    detections, heads = stages[num_stages - 1].detections, detector.roi_heads
    if heads.masks is not None:
        features = detector.cascade_inputs([{"image": image}]).features
        with evaluation_mode(heads):
            detections, _ = heads.masks.add(detections, heads.pyramid(features), num_stages)
    return detections[0]


def draw_image(shape: tuple[int, int, int]) -> Tensor:
    """An image of random pixels, uint8 ``shape``."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
