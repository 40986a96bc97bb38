"""Types that other rooms share: boxes, detections, statistics of a call."""

from cascade_det.core.structures.boxes import ImageSizes
from cascade_det.core.structures.outputs import (
    EXIT_REASONS,
    CascadeInputs,
    CascadeStats,
    Detections,
    DetectorOutput,
    Found,
    ImageTiles,
    PartTimer,
    StageOutput,
    measure_tiles,
    part,
)

__all__ = [
    "EXIT_REASONS",
    "CascadeInputs",
    "CascadeStats",
    "Detections",
    "DetectorOutput",
    "Found",
    "ImageSizes",
    "ImageTiles",
    "PartTimer",
    "StageOutput",
    "measure_tiles",
    "part",
]
