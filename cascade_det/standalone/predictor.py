"""Detection in images with trained weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, overload

import numpy as np
from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.core import Detections, DetectorOutput
from cascade_det.data.given_images import Image, Images
from cascade_det.engine.datasets import images_to_optimise_with
from cascade_det.engine.head_flops import region_flops
from cascade_det.engine.run_info import class_labels, usable_run_info
from cascade_det.engine.run_weights import log_exits
from cascade_det.errors import ConfigError
from cascade_det.monitoring.monitor import ExitMonitor
from cascade_det.monitoring.shadow import ShadowRules
from cascade_det.standalone.build import build_detector
from cascade_det.standalone.given_batches import GivenBatches
from cascade_det.standalone.optimize import optimize
from cascade_det.standalone.streaming import FrameDetections, stream_detections
from cascade_det.streams.sources import find_sources
from cascade_det.streams.sources import watch as watched
from cascade_det.weights import load_weights

Place = str | PathLike[str] | int


class Predictor:
    """Detects objects in images; threads may share it.

    Args:
        cfg: a configuration with ``MODEL.WEIGHTS``. Images are resized by ``INPUT.MIN_SIZE_TEST``
            and ``MAX_SIZE_TEST`` and run in batches of ``CASCADE.TEST_IMS_PER_BATCH``; the share
            ``CASCADE.SHADOW_SHARE`` of them also runs the full cascade. The detector is optimised
            if ``MODEL.CASCADE.FAST.ENABLED``.
        on_drift: called with a report when exits begin to lose more than calibration promised,
            see ``ExitMonitor``.
        metrics_dir: folder for a ``metrics.json`` about the exits, see ``ExitMonitor``; ``None``
            for none.

    Attributes:
        monitor: an ``ExitMonitor`` with counts of all exits so far.
        class_names: K names from the checkpoint, or ``class 0``, ... without any.
        category_ids: K ids of the training data from the checkpoint, or ``1``, ... without any.
        batch_size: images that run at once.

    Raises:
        ConfigError: ``MODEL.WEIGHTS`` is empty, or keys contradict each other.
        CheckpointError: the weights cannot be read or do not fit.
    """

    def __init__(
        self,
        cfg: CfgNode,
        *,
        on_drift: Callable[[Mapping[str, Any]], None] | None = None,
        metrics_dir: str | PathLike[str] | None = None,
    ) -> None:
        if not cfg.MODEL.WEIGHTS:
            raise ConfigError("MODEL.WEIGHTS is empty: give the file of weights to predict with")
        self.detector = build_detector(cfg).eval()
        file = load_weights(self.detector, cfg.MODEL.WEIGHTS, complete=True).file
        if (fast := config.fast_arguments(cfg)) is not None:
            optimize(self.detector, **fast, images=images_to_optimise_with(cfg))
        log_exits(cfg, self.detector.device, file.path, file.weights)
        num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        run = usable_run_info(file.run, file.path)
        self.class_names, self.category_ids = class_labels(run, num_classes, cfg.MODEL.WEIGHTS)
        self._batches = GivenBatches(cfg)
        self.batch_size = self._batches.batch_size
        self.monitor = ExitMonitor(
            self.detector,
            shadow=ShadowRules(**config.shadow_arguments(cfg)),
            flops=region_flops(self.detector.roi_heads, self.detector.backbone.out_channels),
            on_drift=on_drift,
            output_dir=metrics_dir,
        )

    @overload
    def __call__(self, images: Image, *, names: None = None) -> Detections: ...

    @overload
    def __call__(
        self, images: Images, *, names: Sequence[str] | None = None
    ) -> list[Detections]: ...

    def __call__(
        self, images: Image | Images, *, names: Sequence[str] | None = None
    ) -> Detections | list[Detections]:
        """Detect objects.

        Args:
            images: one image, or a list or tuple of several; each a uint8 array ``[H, W, 3]`` in
                BGR order, as OpenCV reads it, or the path of a file.
            names: one for each of several images, which decides whether it runs the full cascade
                too; by default its path, or for an array the number of images before.

        Returns:
            ``Detections`` on the CPU, boxes in pixels of the given image; a list for several.

        Raises:
            DatasetError: a file is missing or not an image.
            ValueError: an image is something else, or an array not uint8 ``[H, W, 3]``.
        """
        if isinstance(images, (np.ndarray, str, PathLike)):
            return self([images])[0]
        outputs = self.outputs(images, names=names)
        return [found.to("cpu") for output in outputs for found in output.detections]

    def outputs(
        self, images: Images, *, names: Sequence[str] | None = None
    ) -> Iterator[DetectorOutput]:
        """All that the detector returns, batch by batch: with the counts of exits and tiles.

        Arguments and errors as above, for several images; tensors are on the detector's device.
        """
        for batch in self._batches(images, names):
            yield self.monitor.detect(batch)

    def stream(
        self, source: Place | Sequence[Place], *, watch: bool = False
    ) -> Iterator[FrameDetections]:
        """Detect objects in images, videos and cameras, of any length: ``for d in p.stream(...)``.

        Frames are read in a thread, and memory holds three batches of them. A frame or an image
        that cannot be read is a warning in the log, and is left out. Of a camera or an ``rtsp://``
        stream, the newest frame is always next.

        Args:
            source: a file of an image or a video, a folder with images, a glob, an address, the
                number of a camera, or a list of these; see ``streams.sources.find_sources``.
            watch: the sources are folders; go on without end with images that appear there.

        Yields:
            The detections of each image or frame in order, on the CPU; ``frame`` has its pixels,
            its name, and of a video its number and second.

        Raises:
            DatasetError: nothing is found, or a video or camera cannot be opened.
            ConfigError: it is a video, and PyAV is not installed.
        """
        places = source if isinstance(source, list | tuple) else [source]
        names = [str(place) for place in places]
        return stream_detections(self, [watched(names)] if watch else find_sources(names))
