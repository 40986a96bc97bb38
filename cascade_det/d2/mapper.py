"""The mapper of a training with ``CASCADE.AUGMENT``: samples as the standalone host makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.structures import BoxMode

from cascade_det import config
from cascade_det.d2.structures import to_inputs
from cascade_det.data.coco import ImageRecord
from cascade_det.data.loader import detection_sample
from cascade_det.data.samples import REPLACEMENTS_TRIED
from cascade_det.errors import ConfigError
from cascade_det.masks.segmentation import Segmentation

_SHORTEST = 6  # coordinates of a polygon
# Keys whose values ask for what only Detectron2's own mapper reads.
_OF_ITS_MAPPER = ("MODEL.KEYPOINT_ON", "MODEL.LOAD_PROPOSALS")
_WITHOUT_LABELS = ("GeneralizedRCNN", "ProposalNetwork", "RetinaNet")


class AugmentingMapper:
    """Makes the inputs of a model from a data set's entry, as ``DatasetMapper`` does.

    Randomness continues numpy's global generator, which Detectron2 seeds in each worker.
    """

    def __init__(self, cfg: CfgNode, entries: Sequence[dict[str, Any]]) -> None:
        """Set up the augmentation.

        Args:
            cfg: a checked configuration with entries in ``CASCADE.AUGMENT``.
            entries: the training images as dicts of Detectron2, of which some entries take others.
        """
        arguments = config.input_arguments(cfg, train=True)
        if arguments["masks"] is not None:
            arguments["masks"]["maskless"] = "drop"  # as Detectron2 does
        with_masks = arguments["masks"] is not None
        self._with_masks = with_masks
        self._make = detection_sample(
            _Records(entries, with_masks=with_masks),
            **arguments,
            tries=REPLACEMENTS_TRIED if cfg.CASCADE.ON_BAD_DATA == "skip" else 1,
        )

    def __call__(self, entry: dict[str, Any]) -> dict[str, Any]:
        """The entry with ``image`` and ``instances`` in place of its annotations."""
        # Four words, so that the samples of a training differ from each other.
        seed = np.random.randint(0, 2**32, 4, np.uint32)  # noqa: NPY002
        sample = self._make(
            record_of(entry, with_masks=self._with_masks), np.random.default_rng(seed)
        )
        rest = {key: value for key, value in entry.items() if key != "annotations"}
        return {**rest, **to_inputs(sample)}


class _Records(Sequence[ImageRecord]):
    """Entries as records, packed so that workers do not copy them."""

    def __init__(self, entries: Sequence[dict[str, Any]], *, with_masks: bool) -> None:
        self._entries = DatasetFromList(list(entries), copy=False)
        self._with_masks = with_masks

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: Any) -> Any:
        return record_of(self._entries[index], with_masks=self._with_masks)


def record_of(entry: dict[str, Any], *, with_masks: bool) -> ImageRecord:
    """The record of a data set's entry; with masks, objects without one are left out."""
    objects = entry.get("annotations", ())
    if with_masks:
        objects = [x for x in objects if x.get("iscrowd", 0) or _mask_of(x)]
    boxes = [BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS) for x in objects]
    crowds = [bool(x.get("iscrowd", 0)) for x in objects]
    return ImageRecord(
        file_name=entry["file_name"],
        image_id=entry["image_id"],
        height=entry["height"],
        width=entry["width"],
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        classes=np.array([x["category_id"] for x in objects], np.int64),
        iscrowd=np.array(crowds, np.bool_),
        masks=tuple(
            None if crowd else _mask_of(x) for x, crowd in zip(objects, crowds, strict=True)
        )
        if with_masks
        else None,
    )


def _mask_of(annotation: dict[str, Any]) -> Segmentation | None:
    mask = annotation.get("segmentation")
    if not isinstance(mask, list):
        return mask or None
    polygons = [np.asarray(polygon, np.float64).reshape(-1) for polygon in mask]
    return [p for p in polygons if len(p) >= _SHORTEST and len(p) % 2 == 0] or None


def check_augment(cfg: CfgNode) -> None:
    """Check that ``CASCADE.AUGMENT`` can be applied to what Detectron2 reads.

    Raises:
        ConfigError: names key, value and remedy.
    """
    if not cfg.CASCADE.AUGMENT:
        return
    asked = [key for key in _OF_ITS_MAPPER if config.flat(cfg)[key]]
    if cfg.MODEL.META_ARCHITECTURE not in _WITHOUT_LABELS:
        asked.append("MODEL.META_ARCHITECTURE")
    problems = [
        f"{key} is {config.flat(cfg)[key]!r}, but CASCADE.AUGMENT moves boxes and masks only. Set "
        "CASCADE.AUGMENT to ()."
        for key in asked
    ]
    if problems:
        listed = "\n  - ".join(problems)
        raise ConfigError(f"CASCADE.AUGMENT does not fit the model:\n  - {listed}")
