"""Detections with the tiles of the finest map that were computed for them, for pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import overload

import numpy as np
from torch import Tensor

from cascade_det.core import Detections
from cascade_det.core.structures import ImageTiles
from cascade_det.data.given_images import Image, Images
from cascade_det.standalone.predictor import Predictor


@dataclass(kw_only=True)
class TiledDetections(Detections):
    """The detections of an image, best score first.

    Attributes:
        tiles: of its finest map.
    """

    tiles: ImageTiles

    def _map(self, change: Callable[[Tensor], Tensor]) -> TiledDetections:
        # Tiles are of the image, whichever detections are left.
        columns = {name: x for name, x in vars(self).items() if name != "tiles"}
        return TiledDetections(**vars(Detections(**columns)._map(change)), tiles=self.tiles)


class TilePredictor:
    """Detects as a predictor whose exits have a tile gate; takes its place.

    Args:
        predictor: detects.

    Attributes:
        class_names: of the predictor.
        category_ids: of the predictor.
        monitor: of the predictor.
        batch_size: of the predictor.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self.class_names = predictor.class_names
        self.category_ids = predictor.category_ids
        self.monitor = predictor.monitor
        self.batch_size = predictor.batch_size

    @overload
    def __call__(self, images: Image, *, names: None = None) -> TiledDetections: ...

    @overload
    def __call__(
        self, images: Images, *, names: Sequence[str] | None = None
    ) -> list[TiledDetections]: ...

    def __call__(
        self, images: Image | Images, *, names: Sequence[str] | None = None
    ) -> TiledDetections | list[TiledDetections]:
        """Detect objects; arguments, results and errors as of ``Predictor``.

        Raises:
            ValueError: the detector has no tile gate.
        """
        if isinstance(images, (np.ndarray, str, PathLike)):
            return self([images])[0]
        detections = []
        for output in self._predictor.outputs(images, names=names):
            if output.tiles is None:
                raise ValueError("the detector has no tile gate, and so no tiles")
            for found, tiles in zip(output.detections, output.tiles, strict=True):
                own = ImageTiles(
                    tiles.opened.cpu(), tiles.computed.cpu(), tiles.height, tiles.width
                )
                detections.append(TiledDetections(**vars(found.to("cpu")), tiles=own))
        return detections
