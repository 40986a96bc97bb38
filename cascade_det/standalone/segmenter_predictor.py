"""Semantic segmentation of images with trained weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import groupby
from os import PathLike
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from fvcore.common.config import CfgNode
from torch import Tensor

from cascade_det import config
from cascade_det.data.given_images import Image, Images
from cascade_det.data.samples import Sample
from cascade_det.engine.run_info import usable_run_info
from cascade_det.engine.run_weights import log_exits
from cascade_det.errors import ConfigError
from cascade_det.evaluation.semantic import predicted_labels
from cascade_det.standalone.build_segmenter import build_segmenter
from cascade_det.standalone.given_batches import GivenBatches
from cascade_det.standalone.optimize import optimize_segmenter
from cascade_det.weights import load_weights

logger = logging.getLogger(__name__)

LabelImage = npt.NDArray[np.unsignedinteger[Any]]

_MOST_OF_8_BITS = 255  # classes; label 255 is the ignored one of most data sets


class SegmenterPredictor:
    """Finds the class of every pixel of images; threads may share it.

    Args:
        cfg: a configuration of a segmenter with ``MODEL.WEIGHTS``. Images are resized by
            ``INPUT.MIN_SIZE_TEST`` and ``MAX_SIZE_TEST`` and run in batches of
            ``CASCADE.TEST_IMS_PER_BATCH``. The segmenter is optimised if
            ``MODEL.CASCADE.FAST.ENABLED``.

    Attributes:
        segmenter: with its weights.
        class_names: K names from the checkpoint; without any there, ``CASCADE.SEMANTIC_CLASSES``,
            or ``class 0``, ...
        category_ids: ``0..K-1``, the labels of the classes.
        batch_size: images that are read at once; neighbours of one size run at once.

    Raises:
        ConfigError: ``MODEL.WEIGHTS`` is empty, or keys contradict each other.
        CheckpointError: the weights cannot be read or do not fit.
    """

    def __init__(self, cfg: CfgNode) -> None:
        if not cfg.MODEL.WEIGHTS:
            raise ConfigError("MODEL.WEIGHTS is empty: give the file of weights to predict with")
        self.segmenter = build_segmenter(cfg).eval()
        file = load_weights(self.segmenter, cfg.MODEL.WEIGHTS, complete=True).file
        log_exits(cfg, self.segmenter.device, file.path, file.weights)
        run = usable_run_info(file.run, file.path)
        num_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        configured = config.semantic_datasets_arguments(cfg, False)["class_names"]
        self.class_names = list(run.get("class_names", configured))
        if len(self.class_names) != num_classes:
            logger.warning("%s does not name %d classes", cfg.MODEL.WEIGHTS, num_classes)
            self.class_names = [f"class {i}" for i in range(num_classes)]
        self.category_ids = list(range(num_classes))
        self._dtype = np.uint8 if num_classes <= _MOST_OF_8_BITS else np.uint16
        if cfg.MODEL.CASCADE.FAST.ENABLED:
            optimize_segmenter(self.segmenter)
        self._batches = GivenBatches(cfg)
        self.batch_size = self._batches.batch_size

    @overload
    def __call__(self, images: Image, *, names: None = None) -> LabelImage: ...

    @overload
    def __call__(
        self, images: Images, *, names: Sequence[str] | None = None
    ) -> list[LabelImage]: ...

    def __call__(
        self, images: Image | Images, *, names: Sequence[str] | None = None
    ) -> LabelImage | list[LabelImage]:
        """Segment images.

        The labels of an image do not depend on the other images, up to rounding of scores: only
        images of one size share a batch, since padding would change the attention of the decoder.

        Args:
            images: one image, or a list or tuple of several; each a uint8 array ``[H, W, 3]`` in
                BGR order, as OpenCV reads it, or the path of a file.
            names: one for each of several images, for ``file_name`` of their samples.

        Returns:
            The class with the best score of each pixel of the given image, ``[H, W]``: uint8, or
            uint16 with more than 255 classes. A list for several.

        Raises:
            DatasetError: a file is missing or not an image.
            ValueError: an image is something else, or an array not uint8 ``[H, W, 3]``.
        """
        if isinstance(images, (np.ndarray, str, PathLike)):
            return self([images])[0]
        return [
            predicted_labels(scores).astype(self._dtype)
            for batch in self._batches(images, names)
            for scores in self._scores(batch)
        ]

    def _scores(self, batch: Sequence[Sample]) -> Iterator[Tensor]:
        for _, same in groupby(batch, key=lambda sample: sample["image"].shape):
            yield from self.segmenter.segment(list(same)).sem_seg
