"""How frequent the classes of a run are in its training images, for their AP."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.data.catalog import find_dataset
from cascade_det.data.coco import CocoDataset, load_dataset
from cascade_det.engine.datasets import Find
from cascade_det.evaluation.class_frequency import FrequencyEvaluator, frequency_of


def lvis_evaluators(
    cfg: CfgNode, dataset: CocoDataset, find: Find = find_dataset
) -> list[FrequencyEvaluator]:
    """The evaluator of ``CASCADE.LVIS_AP`` for a test set; none where that is off.

    Args:
        cfg: a checked configuration.
        dataset: with its ground truth.
        find: locates a data set by its name and the user's own data sets.

    Raises:
        ConfigError, DatasetError: ``DATASETS.TRAIN`` is needed, and is empty or wrong.
    """
    if not cfg.CASCADE.LVIS_AP:
        return []
    return [
        FrequencyEvaluator(
            ground_truth=dataset.ground_truth,
            category_ids=dataset.category_ids,
            frequencies=class_frequencies(cfg, dataset.ground_truth, find),
            detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        )
    ]


def class_frequencies(cfg: CfgNode, ground_truth: dict[str, Any], find: Find) -> dict[int, str]:
    """``"r"``, ``"c"`` or ``"f"`` by category id: as the json says, or by the training images.

    Crowds count as objects. Arguments and errors as ``lvis_evaluators``.
    """
    categories = ground_truth["categories"]
    if all("frequency" in category for category in categories):
        return {category["id"]: category["frequency"] for category in categories}
    arguments = config.datasets_arguments(cfg, train=True)
    counts: Counter[int] = Counter()
    for name in arguments["names"]:
        source = find(name, arguments["own_datasets"])
        # The training has checked its images, and says what it leaves out.
        trained = load_dataset(source, "skip", check_images=False)
        for record in trained.records:
            counts.update({trained.category_ids[index] for index in record.classes.tolist()})
    return {category["id"]: frequency_of(counts[category["id"]]) for category in categories}
