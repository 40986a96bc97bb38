"""Small ground truths and detector outputs, built by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from detection_rows import detections_of

from cascade_det.core.structures import CascadeStats, Detections, DetectorOutput, StageOutput

CATEGORY_IDS = (3, 7)
CLASS_NAMES = ("cat", "dog")


@pytest.fixture
def coco_content() -> Callable[..., dict[str, Any]]:
    """Content of a json: ``objects`` are (image id, category id, XYWH box[, iscrowd])."""

    def build(objects: Sequence[tuple], *, image_ids: Sequence[int] = (1, 2)) -> dict[str, Any]:
        return {
            "images": [
                {"id": image_id, "file_name": f"{image_id}.jpg", "height": 300, "width": 400}
                for image_id in image_ids
            ],
            "categories": [
                {"id": category_id, "name": name}
                for category_id, name in zip(CATEGORY_IDS, CLASS_NAMES, strict=True)
            ],
            # Ids from 0, as many hand-made files have them.
            "annotations": [
                {
                    "id": number,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": list(box),
                    "area": box[2] * box[3],
                    "iscrowd": crowd[0] if crowd else 0,
                }
                for number, (image_id, category_id, box, *crowd) in enumerate(objects)
            ],
        }

    return build


@pytest.fixture
def detections() -> Callable[..., Detections]:
    """Builds detections from rows of (XYWH box, score, class[, exit stage])."""
    return detections_of


@pytest.fixture
def detector_output() -> Callable[..., DetectorOutput]:
    """Wraps detections, stages, counts and times into what a detector returns."""

    def wrap(
        detections: list[Detections],
        *,
        stages: list[StageOutput] | None = None,
        stats: CascadeStats | None = None,
    ) -> DetectorOutput:
        return DetectorOutput(detections, stats or CascadeStats([], []), stages)

    return wrap
