"""Trials on random records, with the ground truth in the original images, which are larger."""

import dataclasses

from random_records import IMAGE_SIZE, make_recorded_scene

from cascade_det.calibration.calibrator import Calibrator
from cascade_det.calibration.image_matching import ImageMatcher, join_images
from cascade_det.calibration.trials import ExitTrials, Recording
from cascade_det.config import get_cfg
from cascade_det.core.structures import Detections

CATEGORY_IDS = (3, 7, 9)
SCALE = 2
FRAME = (IMAGE_SIZE, tuple(SCALE * side for side in IMAGE_SIZE))
STAGE_FLOPS = (2e6, 3e6, 4e6)


def make_trials(*, seeds=(0, 1), num_proposals=(30, 20), num_stages=3, backwards=False, **others):
    """Two images in each of two records, whose ids are 10, 11, ..., or fall to 10."""
    scenes = [
        make_recorded_scene(seed=seed, num_proposals=num_proposals, num_stages=num_stages, **others)
        for seed in seeds
    ]
    objects = [pair for scene in scenes for pair in zip(*scene.targets, strict=True)]
    ids = list(range(10, 10 + len(objects)))[:: -1 if backwards else 1]
    recording = Recording(
        [scene.record for scene in scenes], ids, [FRAME] * len(ids), STAGE_FLOPS[:num_stages]
    )
    return ExitTrials(recording, ImageMatcher(_content(ids, objects), CATEGORY_IDS), score=0.3)


def make_calibrator(recording, matcher, *, tries=0, **others):
    """With the path alone, or after a free search."""
    arguments = {"learned": None, "score": 0.3, "seed": 0, **others}
    calibrator = Calibrator(get_cfg(), recording, matcher, **arguments)
    if tries:
        calibrator.search_freely(tries)
    return calibrator


def match_images(content, category_ids, detections_by_image, **options):
    """The matched detections of all images at once."""
    matcher = ImageMatcher(content, category_ids, **options)
    return join_images(matcher.match(*item) for item in detections_by_image.items())


def without_stages(detections):
    """The same detections, as if none had left early."""
    return [Detections(d.boxes, d.scores, d.classes, d.exit_stages * 0) for d in detections]


def settled_record(record):
    """A record whose stages all say what the last one does."""
    last = record.stages[-1]
    probs = last.score_state / record.num_stages
    stages = [
        dataclasses.replace(last, score_state=probs * (stage + 1))
        for stage in range(record.num_stages)
    ]
    return dataclasses.replace(record, stages=stages)


def _content(ids, objects):
    annotations = []
    for image_id, (boxes, classes) in zip(ids, objects, strict=True):
        for (x1, y1, x2, y2), index in zip((SCALE * boxes).tolist(), classes.tolist(), strict=True):
            annotations.append(
                {
                    "image_id": image_id,
                    "category_id": CATEGORY_IDS[index],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                }
            )
    height, width = FRAME[1]
    return {
        "images": [{"id": i, "height": height, "width": width} for i in ids],
        "categories": [{"id": c, "name": str(c)} for c in CATEGORY_IDS],
        "annotations": annotations,
    }
