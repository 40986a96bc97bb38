"""Detectron2's loaders; workers ignore signals, and errors name the broken image."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from PIL import Image
from torch.utils.data import get_worker_info

from cascade_det import config
from cascade_det.d2.mapper import AugmentingMapper
from cascade_det.data.samples import REPLACEMENTS_TRIED
from cascade_det.errors import DatasetError
from cascade_det.parallel.signals import obey_main_process, signals_held

logger = logging.getLogger(__name__)

Inputs = dict[str, Any]
Mapper = Callable[[Inputs], Inputs]

_ERROR = "error"


def build_train_loader(cfg: CfgNode) -> Batches:
    """Detectron2's endless loader of ``DATASETS.TRAIN``.

    Its mapper is Detectron2's too, unless ``CASCADE.AUGMENT`` has entries.

    With ``CASCADE.ON_BAD_DATA`` ``error``, an image that cannot be read raises an error; with
    ``skip`` it is logged and replaced by another one.
    """
    skip = cfg.CASCADE.ON_BAD_DATA == "skip"
    if not cfg.CASCADE.AUGMENT:
        mapper = _Reader(DatasetMapper(cfg, is_train=True), skip=skip)
        return Batches(build_detection_train_loader(cfg, mapper=mapper))
    entries = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    )
    augmenting = _Reader(AugmentingMapper(cfg, entries), skip=skip)
    return Batches(build_detection_train_loader(cfg, mapper=augmenting, dataset=entries))


def build_test_loader(cfg: CfgNode, name: str, mapper: Mapper | None = None) -> Batches:
    """Detectron2's loader of this process's share of a test set, in its order.

    Args:
        cfg: a configuration.
        name: of a registered data set.
        mapper: ``None`` for Detectron2's own, without ground truth.
    """
    return Batches(
        build_detection_test_loader(
            cfg,
            name,
            mapper=_Reader(mapper or DatasetMapper(cfg, is_train=False), skip=False),
            batch_size=config.test_loader_arguments(cfg)["images_per_batch"],
        )
    )


class Batches:
    """Batches of a loader of Detectron2 whose mapper is a ``_Reader``.

    Args:
        loader: of Detectron2.
    """

    def __init__(self, loader: Iterable[list[Inputs]]) -> None:
        self._loader: Any = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[Inputs]]:
        """The batches.

        Raises:
            DatasetError: an image cannot be read.
        """
        with signals_held():
            batches = iter(self._loader)
            # With grouping by aspect ratio the workers start at the first batch.
            first = list(itertools.islice(batches, 1))
        for batch in itertools.chain(first, batches):
            for inputs in batch:
                if _ERROR in inputs:
                    raise DatasetError(inputs[_ERROR])
            yield batch


class _Reader:
    """A mapper that returns errors as inputs: PyTorch would add the worker's traceback to them.

    Objects without a mask are dropped if the mapper reads masks: Detectron2 drops those whose
    polygons are all invalid, and ends in a KeyError at those that have none.
    """

    def __init__(self, mapper: Mapper, *, skip: bool) -> None:
        self._mapper = mapper
        self._skip = skip
        self._masks = getattr(mapper, "use_instance_mask", False)
        self._skipped = 0  # in a row
        self._obeys = False

    def __call__(self, record: Inputs) -> Inputs | None:
        if not self._obeys and get_worker_info() is not None:
            self._obeys = True
            obey_main_process()
        try:
            _check_png(record["file_name"])
            inputs = self._mapper(_with_masks(record) if self._masks else record)
        except Exception as error:  # decoders fail in many ways: SyntaxError, struct.error, ...
            message = f"{record['file_name']}: cannot be read ({type(error).__name__}: {error})"
            if self._skip and self._skipped < REPLACEMENTS_TRIED:
                self._skipped += 1
                logger.warning("%s. Training on another image instead", message)
                return None
            return {**record, _ERROR: message}
        self._skipped = 0
        return inputs


def _with_masks(record: Inputs) -> Inputs:
    """Objects without a mask have no polygons, which the mapper drops."""
    objects = record.get("annotations", ())
    filled = [{**entry, "segmentation": entry.get("segmentation") or []} for entry in objects]
    return {**record, **({"annotations": filled} if "annotations" in record else {})}


def _check_png(path: str) -> None:
    """Verify the checksums of a PNG, because Detectron2 accepts damaged ones.

    It reads EXIF data first, which decodes a PNG, ignores any error, and uses the pixels decoded
    until then.
    """
    if path.lower().endswith(".png"):
        with Image.open(path) as image:
            image.verify()
