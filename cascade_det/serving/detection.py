"""One uploaded image in, everything that the page shows of it out."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode

from cascade_det.core.structures import CascadeStats, Detections, PartTimer
from cascade_det.data.coco_results import EncodedMasks, encode_masks
from cascade_det.data.transforms import Pixels
from cascade_det.serving.exit_settings import ExitSetting
from cascade_det.serving.uploads import decode, webp_orientation
from cascade_det.standalone import Predictor
from cascade_det.standalone.given_batches import GivenBatches

_WARM_UP = (480, 640)  # Pixels of an image that is detected in before the first request.

_BEFORE_STAGES = ("decode", "resize", "preprocess", "backbone", "tile gate", "rpn")


class ImageDetection:
    """Detects in one image with a setting of the exits; for one thread at a time.

    Args:
        cfg: of the predictor.
        predictor: the detector and the names of its classes.
    """

    def __init__(self, cfg: CfgNode, predictor: Predictor) -> None:
        self._detector, self._names = predictor.detector, predictor.class_names
        self._batches = GivenBatches(cfg)

    def __call__(self, content: bytes, setting: ExitSetting) -> dict[str, Any]:
        """Detect in an uploaded image.

        Args:
            content: of an image file whose size is checked.
            setting: of the exits.

        Returns:
            Detections, counts and times, which can be written as JSON: see docs/serving.md.

        Raises:
            UploadError: the image cannot be decoded.
        """
        timer = PartTimer(self._detector.device)
        started = time.perf_counter()
        pixels = decode(content)
        decoded = time.perf_counter()
        found = self._detect(pixels, setting, timer)
        milliseconds = {"decode": (decoded - started) * 1000, **found.pop("milliseconds")}
        return {
            **found,
            "webp_orientation": webp_orientation(content),
            "milliseconds": dict(sorted(milliseconds.items(), key=_in_order)),
        }

    def warm_up(self, setting: ExitSetting) -> None:
        """Detect once, so that the first request is not slower than others."""
        self._detect(np.zeros((*_WARM_UP, 3), np.uint8), setting, PartTimer(self._detector.device))

    def _detect(self, pixels: Pixels, setting: ExitSetting, timer: PartTimer) -> dict[str, Any]:
        setting.apply(self._detector)
        height, width = pixels.shape[:2]
        with timer.part("resize"):
            (batch,) = self._batches([pixels], None)
        output = self._detector.detect(batch, timer=timer)
        detections = output.detections[0].to("cpu")
        masks = None
        if detections.masks is not None:
            with timer.part("paste masks"):
                masks = encode_masks(detections, height, width)
        return {
            "setting": setting.name,
            "width": width,
            "height": height,
            "detections": describe(detections, masks, self._names),
            **describe_stats(output.stats),
            "milliseconds": timer.milliseconds,
        }


def _in_order(part: tuple[str, float]) -> tuple[int, int, bool]:
    """Parts in the order of the work: a gate before the stage of its number."""
    name = part[0]
    if name in _BEFORE_STAGES:
        return (0, _BEFORE_STAGES.index(name), False)
    stage = name.removeprefix("stage").removeprefix("gate")
    if stage.isdecimal():
        return (1, int(stage), name.startswith("stage"))
    return (2, 0, False)


def describe(
    detections: Detections, masks: EncodedMasks, class_names: list[str]
) -> list[dict[str, Any]]:
    """Detections for JSON, best score first.

    Args:
        detections: D on the CPU.
        masks: D, see ``encode_masks``; ``None`` for a detector without masks.
        class_names: K.
    """
    return [
        {
            "label": class_names[index],
            "class": index,
            "score": score,
            "box": box,
            "exit_stage": stage,
            **({} if masks is None else {"mask": masks[row]}),
        }
        for row, (box, score, index, stage) in enumerate(
            zip(
                detections.boxes.tolist(),
                detections.scores.tolist(),
                detections.classes.tolist(),
                detections.exit_stages.tolist(),
                strict=True,
            )
        )
    ]


def describe_stats(stats: CascadeStats) -> dict[str, Any]:
    """How many regions entered each stage and why they left, and the tiles, for JSON."""
    tiles = {"count": stats.tiles, "open": stats.tiles_open, "computed": stats.tiles_computed}
    return {
        **({"tiles": tiles} if stats.tiles else {}),
        "proposals": {"count": stats.proposed, "left": stats.left_before},
        "stages": [
            {"entered": entered, "left": left}
            for entered, left in zip(stats.entered, stats.left, strict=True)
        ],
    }
