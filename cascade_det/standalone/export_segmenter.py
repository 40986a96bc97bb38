"""Export of a segmenter to one file, for onnxruntime or ``torch.export.load``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascade_det.onnx_predictor import SEMANTIC_OUTPUT
from cascade_det.standalone.export import (
    EXAMPLE_SHAPE,
    PROGRAM_SHAPE,
    draw_image,
    write_onnx,
    write_program,
)
from cascade_det.standalone.segmenter import SemanticSegmentor

# Image float32 [3, H, W] to logits float32 [K, H, W].
ExportedSegmenter = Callable[[Tensor], Tensor]

# Of the largest logit; rounding of dozens of layers stays far below.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class SegmenterDescription:
    """The description of a segmenter inside its exported file.

    Attributes:
        class_names: K names, the background's included.
        image_format: "BGR" or "RGB", the order of the channels.
        min_size: pixels; the shorter edge of images was resized to this; 0 for no resizing.
        max_size: pixels; upper bound of the longer edge.
    """

    class_names: list[str]
    image_format: str
    min_size: int
    max_size: int

    def to_json(self) -> str:
        """The description as text."""
        return json.dumps(asdict(self))


class SegmenterFunction(nn.Module):
    """A segmenter as a function of one image, in operations that can be exported, without exits.

    Args:
        segmenter: in evaluation mode, not optimised; its parameters are shared.

    Raises:
        ValueError: the segmenter is optimised.
    """

    def __init__(self, segmenter: SemanticSegmentor) -> None:
        super().__init__()
        if segmenter.optimizations:
            raise ValueError(
                "an optimised segmenter cannot be exported: build it without optimize_segmenter"
            )
        self.segmenter = segmenter

    def forward(self, image: Tensor) -> Tensor:
        """Logits float32 ``[K, H, W]`` of an image ``[3, H, W]``, values 0 to 255."""
        segmenter = self.segmenter
        height, width = image.shape[-2:]
        step = segmenter.size_divisibility
        pixels = (image - segmenter.pixel_mean) / segmenter.pixel_std
        # Exporters handle floor division better than remainders.
        right, bottom = ((side + step - 1) // step * step - side for side in (width, height))
        return segmenter.scores(F.pad(pixels, (0, right, 0, bottom))[None])[0, :, :height, :width]


def export_onnx(
    segmenter: SemanticSegmentor, path: str | os.PathLike[str], description: SegmenterDescription
) -> ExportedSegmenter:
    """Write an ONNX file that takes an image of any size.

    Args:
        segmenter: on the CPU, not optimised.
        path: of the file.
        description: written into the file.

    Returns:
        A function that runs the file in onnxruntime.
    """
    import onnxruntime

    model, example = SegmenterFunction(segmenter), draw_image(EXAMPLE_SHAPE).float()
    axes = {SEMANTIC_OUTPUT: {1: "height", 2: "width"}}
    write_onnx(model, path, example, axes, description.to_json())
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


def export_program(
    segmenter: SemanticSegmentor, path: str | os.PathLike[str], description: SegmenterDescription
) -> ExportedSegmenter:
    """Write a ``.pt2`` file for ``torch.export.load``, see ``export.write_program``.

    Sides of images are longer than the stride of the coarsest level, since pooling a map of a
    single pixel would need another program.

    Returns:
        A function that runs the file in PyTorch.
    """
    model, example = SegmenterFunction(segmenter), draw_image(PROGRAM_SHAPE).float()
    coarsest = segmenter.stride * 2 ** (len(segmenter.in_features) - 1)
    return write_program(model, path, example, description.to_json(), smallest=coarsest + 1)


@dataclass
class Comparison:
    """Differences between the logits of an exported file and of its segmenter.

    Attributes:
        difference: the largest of two logits; ``inf`` if shapes differ.
        largest: absolute value of the segmenter's logits.
        labels: share of pixels with the same class.
    """

    difference: float
    largest: float
    labels: float

    @property
    def same(self) -> bool:
        """Whether they agree up to rounding."""
        return self.difference <= _ROUNDING * self.largest


@torch.no_grad()
def compare(segmenter: SemanticSegmentor, exported: ExportedSegmenter, image: Tensor) -> Comparison:
    """Compare an exported file with its segmenter on an image, float32 ``[3, H, W]``."""
    (wanted,) = segmenter.segment([{"image": image}]).sem_seg
    found, largest = exported(image), float(wanted.abs().max())
    if found.shape != wanted.shape:
        return Comparison(float("inf"), largest, 0.0)
    labels = (found.argmax(0) == wanted.argmax(0)).double().mean()
    return Comparison(float((found - wanted).abs().max()), largest, float(labels))
