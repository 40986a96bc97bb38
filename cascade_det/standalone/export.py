"""A whole detector of fixed depth in one file, for onnxruntime or ``torch.export.load``."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from cascade_det.core.modes import evaluation_mode
from cascade_det.errors import ConfigError
from cascade_det.onnx_predictor import (
    INPUTS,
    LONGEST_SIDE,
    METADATA_KEY,
    OUTPUTS,
    ExportedModel,
    OnnxPredictor,
)
from cascade_det.standalone.detector import Detector
from cascade_det.standalone.fixed_depth import FixedDepthDetector

FORMATS = ("onnx", "torch-export")
# The first with RoIAlign whose pixels are aligned is 16; 18 is what the exporter was made for.
OPSET = 18
METADATA_FILE = f"{METADATA_KEY}.json"
_PACKAGES = {"onnx": ("onnx", "onnxruntime"), "torch-export": ()}
# Of an image that is recorded. Its sides are no multiples of anything, so that nothing is taken
# for a constant.
_EXAMPLE = (3, 150, 211)

# An image uint8 [3, H, W] to its boxes [D, 4], scores [D] and classes [D].
Run = Callable[[Tensor], tuple[Tensor, ...]]


def stages_to_export(cfg: CfgNode, file_format: str, num_stages: int | None) -> int:
    """How many stages a file will have, after a look at what an export would fail on.

    Args:
        cfg: of the detector.
        file_format: one of ``FORMATS``.
        num_stages: wanted; ``None`` for all, which a cascade with exits does not have.

    Raises:
        ConfigError: a package is missing, there are no weights or not so many stages, or exits
            are on and it was not said how many stages to take in their place.
    """
    for package in _PACKAGES[file_format]:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"--format {file_format} needs {package}, which is not installed: pip install "
                f"{' '.join(_PACKAGES[file_format])}"
            )
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError("MODEL.WEIGHTS is empty: give the file of weights to export")
    available = len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
    if num_stages is None:
        if cfg.MODEL.CASCADE.EXIT.ENABLED and cfg.MODEL.ROI_HEADS.NAME != "CascadeROIHeads":
            raise ConfigError(
                "MODEL.CASCADE.EXIT.ENABLED is True, but an exported file has no exits: all "
                "regions take the same stages. Say how many with --stages (1 to "
                f"{available}), which leaves the exits out, or set the key to False for all."
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
) -> Run:
    """Write an ONNX file; height and width of its image are free.

    Args:
        detector: on the CPU, not optimised.
        path: of the file.
        description: goes into the file. Its ``num_stages`` are exported.

    Returns:
        The file, run by onnxruntime.
    """
    import onnx

    model = FixedDepthDetector(detector, description.num_stages)
    sides = {1: "height", 2: "width"}
    with evaluation_mode(model), torch.no_grad(), warnings.catch_warnings():
        # On Python values that are constants by intention, and on the age of the exporter: the
        # one by torch.export takes many times as long for the same file.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (_example(),),
            os.fspath(path),
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            dynamic_axes={"image": sides, **{name: {0: "detections"} for name in OUTPUTS}},
            opset_version=OPSET,
            dynamo=False,
        )
    content = onnx.load(path)
    onnx.helper.set_model_props(content, {METADATA_KEY: description.to_json()})
    onnx.checker.check_model(content)
    onnx.save(content, path)
    predictor = OnnxPredictor(path)
    return lambda image: tuple(torch.from_numpy(x) for x in predictor.run(image.numpy()))


def export_program(
    detector: Detector, path: str | os.PathLike[str], description: ExportedModel
) -> Run:
    """Write a ``.pt2`` file for ``torch.export.load``; arguments as of ``export_onnx``.

    Sides of its images are 2 to 65,536 px long. The description is in it as ``cascade_det.json``.

    Returns:
        The file, run by PyTorch.
    """
    model = FixedDepthDetector(detector, description.num_stages)
    sides = {
        axis: torch.export.Dim(name, min=2, max=LONGEST_SIDE)
        for axis, name in ((1, "height"), (2, "width"))
    }
    with evaluation_mode(model), torch.no_grad():
        program = torch.export.export(
            model,
            (_example(),),
            dynamic_shapes=(sides,),
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    torch.export.save(program, path, extra_files={METADATA_FILE: description.to_json()})
    return torch.export.load(path).module()


@dataclass
class Comparison:
    """How far the detections of an exported file are from the detector's own.

    Attributes:
        num_detections: of the detector.
        num_exported: of the file.
        boxes: pixels; the largest distance of a coordinate from that of the nearest detection of
            the same class; ``inf`` where there is none.
        scores: the largest difference of their scores.
    """

    num_detections: int
    num_exported: int
    boxes: float
    scores: float

    @property
    def same(self) -> bool:
        """Whether they are the same up to rounding."""
        counts_agree = self.num_detections == self.num_exported
        return counts_agree and self.boxes < 0.05 and self.scores < 1e-3


def compare(detector: Detector, run: Run, image: Tensor, num_stages: int) -> Comparison:
    """Hold a file against its detector on an image, uint8 ``[3, H, W]``."""
    stages = detector.detect([{"image": image}], stages=True).stages
    assert stages is not None
    wanted = stages[num_stages - 1].detections[0]
    boxes, scores, classes = run(image)
    if len(boxes) == 0 or len(wanted) == 0:
        distance = 0.0 if len(boxes) == len(wanted) else float("inf")
        return Comparison(len(wanted), len(boxes), distance, distance)
    distances = (wanted.boxes[:, None] - boxes).abs().amax(dim=2)
    distances[wanted.classes[:, None] != classes] = torch.inf
    gaps = (wanted.scores[:, None] - scores).abs()
    nearest = [(distances.amin(dim=axis), distances.argmin(dim=axis)) for axis in (0, 1)]
    score_gaps = [
        gaps.gather(axis, at.unsqueeze(axis)).max() for axis, (_, at) in enumerate(nearest)
    ]
    return Comparison(
        len(wanted),
        len(boxes),
        float(max(near.max() for near, _ in nearest)),
        float(max(score_gaps)),
    )


def _example() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, _EXAMPLE, dtype=torch.uint8, generator=generator)
