"""Detection by an ONNX file alone: no PyTorch, no configuration, no weights beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints, overload

import numpy as np
from numpy.typing import NDArray

from cascade_det.data.given_images import Image, Images, check_images, given_pixels
from cascade_det.data.issues import shown
from cascade_det.data.transforms import IMAGE_FORMATS, resize_shortest_edge
from cascade_det.errors import CheckpointError, ConfigError
from cascade_det.text import check_name, printable

METADATA_KEY = "cascade_det"
INPUTS = ("image",)
OUTPUTS = ("boxes", "scores", "classes")
_REMEDY = "Make one with tools/export.py --format onnx."

# No file makes anybody ask for more memory than there is.
LONGEST_SIDE = 2**16  # pixels of an image
MOST_PIXELS = 2**26  # of a resized image: 8,192 x 8,192
_LONGEST_METADATA = 2**22  # characters: names of 10,000 classes and more
_LARGEST_ID = 2**63 - 1


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
            ValueError: it did not write this, or images would be resized beyond ``MOST_PIXELS``.
        """
        if len(text) > _LONGEST_METADATA:
            raise ValueError(f"it has {len(text):,} characters")
        content = json.loads(text)
        if not isinstance(content, dict) or not {f.name for f in fields(cls)} <= set(content):
            raise ValueError("keys are missing")
        model = cls(**{f.name: content[f.name] for f in fields(cls)})
        model._check()
        return model

    def _check(self) -> None:
        self._check_types()
        if len(self.class_names) != len(self.category_ids):
            raise ValueError("as many class_names as category_ids are needed")
        for class_name in self.class_names:
            _check_class_name(class_name)
        if len(set(self.category_ids)) != len(self.category_ids):
            raise ValueError("category_ids has an id twice")
        if not all(-_LARGEST_ID <= number <= _LARGEST_ID for number in self.category_ids):
            raise ValueError("category_ids has an id of more than 64 bits")
        if self.image_format not in IMAGE_FORMATS:
            raise ValueError(f"image_format is {shown(self.image_format)}")
        for name, least in (("min_size", 0), ("max_size", 1), ("num_stages", 1)):
            if not least <= getattr(self, name) <= LONGEST_SIDE:
                raise ValueError(f"{name} is {shown(getattr(self, name))}")
        if min(self.min_size, self.max_size) * self.max_size > MOST_PIXELS:
            raise ValueError(
                f"min_size {self.min_size} and max_size {self.max_size} allow images of more than "
                f"{MOST_PIXELS:,} pixels"
            )

    def _check_types(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            item = {list[str]: str, list[int]: int}.get(kind)
            wanted = kind if item is None else list
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise ValueError(f"{name} is {shown(value)}")
            if item is not None and not all(type(x) is item for x in value):
                raise ValueError(f"{name} is {shown(value)}")


def _check_class_name(name: str) -> None:
    try:
        check_name(name)
    except ValueError as error:
        raise ValueError(f"a name in class_names cannot be used: {error}") from None


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

    It may be shared between threads. A pickled one opens its file again where it is unpickled.

    Args:
        path: the ONNX file. What it keeps in other files has to be in its own folder or below.
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
        path: str | os.PathLike[str],
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        self._path, self._providers = Path(path).absolute(), tuple(providers)
        self._session = _open(Path(path), providers)
        self.model = _described(Path(path), self._session)
        self.class_names = self.model.class_names
        self.category_ids = self.model.category_ids

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self._path, "providers": self._providers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], providers=state["providers"])  # type: ignore[misc]

    @overload
    def __call__(self, images: Image, *, names: None = None) -> ArrayDetections: ...

    @overload
    def __call__(
        self, images: Images, *, names: Sequence[str] | None = None
    ) -> list[ArrayDetections]: ...

    def __call__(
        self, images: Image | Images, *, names: Sequence[str] | None = None
    ) -> ArrayDetections | list[ArrayDetections]:
        """Detect objects.

        Args:
            images: one image, or a list or tuple of several; each a uint8 array ``[H, W, 3]`` in
                BGR order, as OpenCV reads it, or the path of a file.
            names: taken as ``Predictor`` takes it, and not used: there are no exits to watch.

        Returns:
            ``ArrayDetections``, boxes in pixels of the given image; a list for several.

        Raises:
            DatasetError: if a file is missing or no image.
            CheckpointError: the file fails, or what it gives are no detections: boxes or scores
                that are not finite, scores outside [0, 1] or not in descending order, or classes
                that it does not name.
            ValueError: if an image is something else, or an array not uint8 ``[H, W, 3]``.
        """
        if isinstance(images, (np.ndarray, str, os.PathLike)):
            return self([images])[0]
        return [self._detect(image) for image in check_images(images, names)]

    def run(self, image: NDArray[np.uint8]) -> tuple[NDArray[Any], ...]:
        """Boxes, scores and classes as the file gives them, of a resized image ``[3, H, W]``.

        Raises:
            CheckpointError: the file fails.
        """
        try:
            outputs = self._session.run(list(OUTPUTS), {"image": np.ascontiguousarray(image)})
        except Exception as error:  # onnxruntime's own errors have no base but this
            height, width = image.shape[1:]
            raise CheckpointError(
                f"{self._path}: fails on an image of {width} x {height} px "
                f"({printable(str(error), longest=300)}). {_REMEDY}"
            ) from error
        return tuple(outputs)

    def _detect(self, image: Image) -> ArrayDetections:
        pixels = given_pixels(image, self.model.image_format)
        resized = resize_shortest_edge(pixels, self.model.min_size, self.model.max_size)
        boxes, scores, classes = self.run(resized.transpose(2, 0, 1))
        wrong = _what_is_wrong(boxes, scores, classes, len(self.class_names))
        if wrong is not None:
            raise CheckpointError(f"{self._path}: gives {wrong}. {_REMEDY}")
        # In float32, in the order of the detector's own rescaling.
        (height, width), (from_height, from_width) = pixels.shape[:2], resized.shape[:2]
        scale_x, scale_y = width / from_width, height / from_height
        with np.errstate(over="ignore"):  # what is beyond float32 is beyond the image
            scaled = boxes * np.array([scale_x, scale_y, scale_x, scale_y], np.float32)
        boxes = np.clip(scaled, 0, np.array([width, height, width, height], np.float32))
        kept = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        stages = np.full(int(kept.sum()), self.model.num_stages - 1, np.int64)
        return ArrayDetections(boxes[kept], scores[kept], classes[kept], stages)


def _what_is_wrong(
    boxes: NDArray[Any], scores: NDArray[Any], classes: NDArray[Any], num_classes: int
) -> str | None:
    if scores.ndim != 1 or boxes.shape != (len(scores), 4) or classes.shape != scores.shape:
        shapes = [list(array.shape) for array in (boxes, scores, classes)]
        return "boxes of shape {}, scores of shape {} and classes of shape {}".format(*shapes)
    if not np.isfinite(boxes).all():
        return "boxes that are not finite"
    # NaN fails every comparison.
    if not ((scores >= 0) & (scores <= 1)).all():
        return "scores outside [0, 1]"
    if (scores[1:] > scores[:-1]).any():
        return "scores that are not in descending order"
    if not ((classes >= 0) & (classes < num_classes)).all():
        return "classes that it does not name"
    return None


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
    # Errors are raised as well, and its log would send names from the file to the terminal.
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # onnxruntime's own errors have no base but this
        raise CheckpointError(
            f"{path}: onnxruntime cannot open it ({printable(str(error), longest=300)}). The file "
            f"is damaged or no ONNX. {_REMEDY}"
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
