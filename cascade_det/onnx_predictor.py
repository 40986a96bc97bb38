"""Detection by an ONNX file alone: no PyTorch, no configuration, no weights beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, get_type_hints, overload

import numpy as np
from numpy.typing import NDArray

from cascade_det.data.transforms import IMAGE_FORMATS, read_image, resize_shortest_edge
from cascade_det.errors import CheckpointError, ConfigError

METADATA_KEY = "cascade_det"
INPUTS = ("image",)
OUTPUTS = ("boxes", "scores", "classes")
_REMEDY = "Make one with tools/export.py --format onnx."

LONGEST_SIDE = 2**16  # pixels: no file makes anybody ask for more memory than there is

Image = NDArray[np.uint8] | str | PathLike[str]


@dataclass(frozen=True)
class ExportedModel:
    """What an exported file says of itself.

    Attributes:
        class_names: K names.
        category_ids: K ids of the data set that the weights were trained on.
        image_format: "BGR" or "RGB", the order of the channels.
        min_size: the shorter edge of images is resized to so many pixels; 0: not at all.
        max_size: the longer edge gets no longer than this.
        num_stages: how many stages every region takes.
    """

    class_names: list[str]
    category_ids: list[int]
    image_format: str
    min_size: int
    max_size: int
    num_stages: int

    def to_json(self) -> str:
        """For ``from_json``."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ExportedModel:
        """What ``to_json`` wrote.

        Raises:
            ValueError: it did not write this.
        """
        content = json.loads(text)
        if not isinstance(content, dict) or not {f.name for f in fields(cls)} <= set(content):
            raise ValueError("keys are missing")
        model = cls(**{f.name: content[f.name] for f in fields(cls)})
        model._check()
        return model

    def _check(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            item = {list[str]: str, list[int]: int}.get(kind)
            wanted = kind if item is None else list
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}")
            if item is not None and not all(type(x) is item for x in value):
                raise ValueError(f"{name} is {value!r}")
        if len(self.class_names) != len(self.category_ids):
            raise ValueError("as many class_names as category_ids are needed")
        if self.image_format not in IMAGE_FORMATS:
            raise ValueError(f"image_format is {self.image_format!r}")
        for name, least in (("min_size", 0), ("max_size", 1), ("num_stages", 1)):
            if not least <= getattr(self, name) <= LONGEST_SIDE:
                raise ValueError(f"{name} is {getattr(self, name)}")


@dataclass
class ArrayDetections:
    """The detections of one image, best score first; as ``core.Detections``, of NumPy arrays.

    Attributes:
        boxes: float32 ``[D, 4]``, XYXY in absolute pixels.
        scores: float32 ``[D]`` in [0, 1].
        classes: int64 ``[D]`` in ``[0, K)``.
        exit_stages: int64 ``[D]``: the last stage of the file, for all of them.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    classes: NDArray[np.int64]
    exit_stages: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.boxes)


class OnnxPredictor:
    """Detects objects in images by a file of ``tools/export.py``, as ``Predictor`` does by weights.

    Args:
        path: the ONNX file.
        providers: of onnxruntime, the preferred one first.

    Attributes:
        model: what the file says of itself.
        class_names: K names.
        category_ids: K ids of the data set that the weights were trained on.
        batch_size: images that run at once: 1.

    Raises:
        CheckpointError: the file is missing, broken, or not made by ``tools/export.py``.
        ConfigError: onnxruntime is not installed.
    """

    batch_size = 1

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        self._session = _open(Path(path), providers)
        self.model = _described(Path(path), self._session)
        self.class_names = self.model.class_names
        self.category_ids = self.model.category_ids

    @overload
    def __call__(self, images: Image, *, names: None = None) -> ArrayDetections: ...

    @overload
    def __call__(
        self, images: list[Image], *, names: Sequence[str] | None = None
    ) -> list[ArrayDetections]: ...

    def __call__(
        self, images: Image | list[Image], *, names: Sequence[str] | None = None
    ) -> ArrayDetections | list[ArrayDetections]:
        """Detect objects.

        Args:
            images: one image or several; each a uint8 array ``[H, W, 3]`` in BGR order, as
                OpenCV reads it, or the path of a file.
            names: taken as ``Predictor`` takes it, and not used: there are no exits to watch.

        Returns:
            ``ArrayDetections``, boxes in pixels of the given image; a list for a list.

        Raises:
            DatasetError: if a file is missing or no image.
            CheckpointError: what the file gives are no detections.
            ValueError: if an array is not uint8 ``[H, W, 3]``.
        """
        if isinstance(images, (np.ndarray, str, PathLike)):
            return self._detect(images)
        return [self._detect(image) for image in images]

    def run(self, image: NDArray[np.uint8]) -> tuple[NDArray[Any], ...]:
        """Boxes, scores and classes as the file gives them, of a resized image ``[3, H, W]``."""
        return tuple(self._session.run(list(OUTPUTS), {"image": np.ascontiguousarray(image)}))

    def _detect(self, image: Image) -> ArrayDetections:
        pixels = self._pixels(image)
        resized = resize_shortest_edge(pixels, self.model.min_size, self.model.max_size)
        boxes, scores, classes = self.run(resized.transpose(2, 0, 1))
        if boxes.shape != (len(scores), 4) or classes.shape != scores.shape:
            raise CheckpointError(f"The ONNX file gives boxes of shape {boxes.shape}. {_REMEDY}")
        if not ((classes >= 0) & (classes < len(self.class_names))).all():
            raise CheckpointError(f"The ONNX file gives classes that it does not name. {_REMEDY}")
        # In float32, in the order of the detector's own rescaling.
        (height, width), (from_height, from_width) = pixels.shape[:2], resized.shape[:2]
        scale_x, scale_y = width / from_width, height / from_height
        scaled = boxes * np.array([scale_x, scale_y, scale_x, scale_y], np.float32)
        boxes = np.clip(scaled, 0, np.array([width, height, width, height], np.float32))
        kept = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        stages = np.full(int(kept.sum()), self.model.num_stages - 1, np.int64)
        return ArrayDetections(boxes[kept], scores[kept], classes[kept], stages)

    def _pixels(self, image: Image) -> NDArray[np.uint8]:
        if isinstance(image, (str, PathLike)):
            return read_image(str(image), self.model.image_format)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(
                f"an image must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}"
            )
        return image if self.model.image_format == "BGR" else image[:, :, ::-1]


def _open(path: Path, providers: Sequence[str]) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError(
            "an ONNX file runs in onnxruntime, which is not installed: pip install onnxruntime"
        ) from None
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file. {_REMEDY}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # Errors alone: warnings are on optimisations of the graph.
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # onnxruntime's own errors have no base but this
        raise CheckpointError(
            f"{path}: onnxruntime cannot open it ({error}). The file is damaged or no ONNX. "
            f"{_REMEDY}"
        ) from error


def _described(path: Path, session: Any) -> ExportedModel:
    """What the file says of itself, if it is one of ours."""
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if text is None:
        raise CheckpointError(
            f"{path}: an ONNX file without the metadata {METADATA_KEY!r}, which names its classes "
            f"and the size of its images. {_REMEDY}"
        )
    try:
        model = ExportedModel.from_json(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: its metadata {METADATA_KEY!r} cannot be used ({error}). {_REMEDY}"
        ) from error
    inputs = [(i.name, i.type, len(i.shape)) for i in session.get_inputs()]
    outputs = [(o.name, o.type) for o in session.get_outputs()]
    types = ("tensor(float)", "tensor(float)", "tensor(int64)")
    if inputs != [("image", "tensor(uint8)", 3)] or outputs != list(
        zip(OUTPUTS, types, strict=True)
    ):
        raise CheckpointError(
            f"{path}: takes {inputs} and gives {outputs}, not a uint8 image [3, H, W] and "
            f"{', '.join(OUTPUTS)}. {_REMEDY}"
        )
    return model
