"""Detection with an exported ONNX file, without PyTorch, configuration and weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from cascade_det.data.given_images import Image, Images, check_images, given_pixels
from cascade_det.data.issues import shown
from cascade_det.data.transforms import IMAGE_FORMATS, resize_shortest_edge
from cascade_det.errors import CheckpointError, ConfigError
from cascade_det.masks.pasting import paste_masks
from cascade_det.text import check_name, printable

METADATA_KEY = "cascade_det"
INPUTS = ("image",)
OUTPUTS = ("boxes", "scores", "classes")
OUTPUTS_WITH_MASKS = (*OUTPUTS, "masks")
SEMANTIC_OUTPUT = "sem_seg"  # of segmenters, which are not run here
_OUTPUT_TYPES = ("tensor(float)", "tensor(float)", "tensor(int64)", "tensor(float)")
_REMEDY = "Make one with cascade-det export --format onnx."

# Bounds on the memory that a file can make us allocate.
LONGEST_SIDE = 2**16  # pixels of an image
MOST_PIXELS = 2**26  # of a resized image: 8,192 x 8,192
_LONGEST_METADATA = 2**22  # characters, enough for the names of 10,000 classes
_LARGEST_ID = 2**63 - 1
_LARGEST_MASK = 2**10  # cells per side


@dataclass(frozen=True)
class ExportedModel:
    """The description of a detector inside its exported file.

    Attributes:
        class_names: K names.
        category_ids: K ids of the data set that the weights were trained on.
        image_format: "BGR" or "RGB", the order of the channels.
        min_size: pixels; the shorter edge of images is resized to this; 0 for no resizing.
        max_size: pixels; upper bound of the longer edge.
        num_stages: stages that every region runs through.
    """

    class_names: list[str]
    category_ids: list[int]
    image_format: str
    min_size: int
    max_size: int
    num_stages: int

    def to_json(self) -> str:
        """The description as text for ``from_json``."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ExportedModel:
        """Read what ``to_json`` wrote; other keys are ignored.

        Raises:
            ValueError: it did not write this, or images would be resized beyond ``MOST_PIXELS``.
        """
        if len(text) > _LONGEST_METADATA:
            raise ValueError(f"it has {len(text):,} characters")
        content = json.loads(text)
        names = [field.name for field in fields(cls)]
        if not isinstance(content, dict) or not content.keys() >= set(names):
            raise ValueError("keys are missing")
        _check_classes(content["class_names"], content["category_ids"])
        if content["image_format"] not in IMAGE_FORMATS:
            raise ValueError(f"image_format is {shown(content['image_format'])}")
        _check_sizes(content)
        return cls(**{name: content[name] for name in names})


def _check_classes(class_names: Any, category_ids: Any) -> None:
    for key, values, kind in (
        ("class_names", class_names, str),
        ("category_ids", category_ids, int),
    ):
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise ValueError(f"{key} is {shown(values)}")
    if len(class_names) != len(category_ids):
        raise ValueError("class_names and category_ids have different lengths")
    for class_name in class_names:
        try:
            check_name(class_name)
        except ValueError as error:
            raise ValueError(f"a name in class_names cannot be used: {error}") from None
    if len(set(category_ids)) != len(category_ids):
        raise ValueError("category_ids has an id twice")
    if any(abs(number) > _LARGEST_ID for number in category_ids):
        raise ValueError("category_ids has an id of more than 64 bits")


def _check_sizes(content: Mapping[str, Any]) -> None:
    for key, least in (("min_size", 0), ("max_size", 1), ("num_stages", 1)):
        if type(content[key]) is not int or not least <= content[key] <= LONGEST_SIDE:
            raise ValueError(f"{key} is {shown(content[key])}")
    min_size, max_size = content["min_size"], content["max_size"]
    if min(min_size, max_size) * max_size > MOST_PIXELS:
        raise ValueError(
            f"min_size {min_size} and max_size {max_size} allow images of more than "
            f"{MOST_PIXELS:,} pixels"
        )


@dataclass
class ArrayDetections:
    """The detections of one image as NumPy arrays, best score first; see ``core.Detections``.

    Attributes:
        boxes: float32 ``[D, 4]``, XYXY in absolute pixels.
        scores: float32 ``[D]`` in [0, 1].
        classes: int64 ``[D]`` in ``[0, K)``.
        exit_stages: int64 ``[D]``, all the last stage of the file.
        masks: float32 ``[D, M, M]`` in [0, 1], all 0 for a detection without a mask; ``None`` for
            a file without masks.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    classes: NDArray[np.int64]
    exit_stages: NDArray[np.int64]
    masks: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def paste(self, height: int, width: int) -> NDArray[np.bool_]:
        """The masks in an image, as ``Detections.paste``: bool ``[D, height, width]``.

        Raises:
            ValueError: the file gives no masks.
        """
        if self.masks is None:
            raise ValueError("these detections have no masks: the file was exported without")
        return paste_masks(self.masks, self.boxes, height, width)


class OnnxPredictor:
    """Detects objects in images with a file of ``cascade-det export``; called like ``Predictor``.

    Threads may share it. Unpickling opens the file again.

    Args:
        path: the ONNX file. External data must be in its own folder or below.
        providers: of onnxruntime, the preferred one first.

    Attributes:
        model: the description in the file.
        class_names: K names.
        category_ids: K ids of the data set that the weights were trained on.
        batch_size: images that run at once: 1.

    Raises:
        CheckpointError: the file is missing, damaged, or not from ``cascade-det export``.
        ConfigError: onnxruntime is not installed.
    """

    batch_size = 1

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        self._path = Path(path).absolute()
        self._providers = tuple(providers)
        self._session = _open(Path(path), providers)
        self.model = _read_description(Path(path), self._session)
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
            names: as in ``Predictor``, but without effect.

        Returns:
            ``ArrayDetections``, boxes in pixels of the given image; a list for several.

        Raises:
            DatasetError: a file is missing or not an image.
            CheckpointError: the ONNX file fails, or its outputs are not detections: boxes or
                scores are not finite, scores or masks are outside [0, 1], scores are not in
                descending order, or classes are not in ``[0, K)``.
            ValueError: an image is something else, or an array not uint8 ``[H, W, 3]``.
        """
        if isinstance(images, (np.ndarray, str, os.PathLike)):
            return self([images])[0]
        return [self._detect(image) for image in check_images(images, names)]

    def run(self, image: NDArray[np.uint8]) -> tuple[NDArray[Any], ...]:
        """Run the file on a resized image uint8 ``[3, H, W]``.

        Returns:
            Its boxes, scores, classes and, if it has them, masks, unchecked.

        Raises:
            CheckpointError: the file fails.
        """
        try:
            outputs = self._session.run(None, {"image": np.ascontiguousarray(image)})
        except Exception as error:  # onnxruntime's errors have no other base class
            height, width = image.shape[1:]
            raise CheckpointError(
                f"{self._path}: fails on an image of {width} x {height} px "
                f"({printable(str(error), longest=300)}). {_REMEDY}"
            ) from error
        return tuple(outputs)

    def _detect(self, image: Image) -> ArrayDetections:
        pixels = given_pixels(image, self.model.image_format)
        resized = resize_shortest_edge(pixels, self.model.min_size, self.model.max_size)
        boxes, scores, classes, *rest = self.run(resized.transpose(2, 0, 1))
        masks = rest[0] if rest else None
        error = _find_error(boxes, scores, classes, masks, len(self.class_names))
        if error is not None:
            raise CheckpointError(f"{self._path}: gives {error}. {_REMEDY}")
        # In float32 and in this order, as the detector rescales.
        height, width = pixels.shape[:2]
        scale_x, scale_y = width / resized.shape[1], height / resized.shape[0]
        with np.errstate(over="ignore"):  # infinite coordinates are clipped to the image
            scaled = boxes * np.array([scale_x, scale_y, scale_x, scale_y], np.float32)
        boxes = np.clip(scaled, 0, np.array([width, height, width, height], np.float32))
        kept = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        stages = np.full(int(kept.sum()), self.model.num_stages - 1, np.int64)
        masks = None if masks is None else masks[kept]
        return ArrayDetections(boxes[kept], scores[kept], classes[kept], stages, masks)


def _find_error(
    boxes: NDArray[Any],
    scores: NDArray[Any],
    classes: NDArray[Any],
    masks: NDArray[Any] | None,
    num_classes: int,
) -> str | None:
    if scores.ndim != 1 or boxes.shape != (len(scores), 4) or classes.shape != scores.shape:
        return (
            f"boxes of shape {list(boxes.shape)}, scores of shape {list(scores.shape)} and "
            f"classes of shape {list(classes.shape)}"
        )
    if not np.isfinite(boxes).all():
        return "boxes that are not finite"
    # NaN fails every comparison.
    if not ((scores >= 0) & (scores <= 1)).all():
        return "scores outside [0, 1]"
    if (scores[1:] > scores[:-1]).any():
        return "scores that are not in descending order"
    if not ((classes >= 0) & (classes < num_classes)).all():
        return "classes that it does not name"
    return None if masks is None else _find_mask_error(masks, len(boxes))


def _find_mask_error(masks: NDArray[Any], count: int) -> str | None:
    size = masks.shape[-1] if masks.ndim else 0
    if masks.shape != (count, size, size) or not 1 <= size <= _LARGEST_MASK:
        return f"masks of shape {list(masks.shape)} for {count} boxes"
    if not ((masks >= 0) & (masks <= 1)).all():
        return "masks outside [0, 1]"
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
    # Errors are raised anyway, and the log would print names from the file to the terminal.
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # onnxruntime's errors have no other base class
        raise CheckpointError(
            f"{path}: onnxruntime cannot open it ({printable(str(error), longest=300)}). The file "
            f"is damaged or not ONNX. {_REMEDY}"
        ) from error


def _read_description(path: Path, session: Any) -> ExportedModel:
    """The description in the file, which must have our inputs and outputs."""
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if text is None:
        raise CheckpointError(
            f"{path}: an ONNX file without the metadata {METADATA_KEY!r}, which names its classes "
            f"and the size of its images. {_REMEDY}"
        )
    if [output.name for output in session.get_outputs()] == [SEMANTIC_OUTPUT]:
        raise CheckpointError(
            f"{path}: a segmenter, but this runs detectors. docs/inference.md (Export) shows how "
            "to run it in onnxruntime."
        )
    try:
        model = ExportedModel.from_json(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: its metadata {METADATA_KEY!r} cannot be used ({error}). {_REMEDY}"
        ) from error
    inputs = [(i.name, i.type, len(i.shape)) for i in session.get_inputs()]
    outputs = [(o.name, o.type) for o in session.get_outputs()]
    wanted = list(zip(OUTPUTS_WITH_MASKS, _OUTPUT_TYPES, strict=True))
    if inputs != [("image", "tensor(uint8)", 3)] or outputs not in (wanted[:-1], wanted):
        raise CheckpointError(
            f"{path}: takes {inputs} and gives {outputs}, not a uint8 image [3, H, W] and "
            f"{', '.join(OUTPUTS)} and, with masks, masks. {_REMEDY}"
        )
    return model
