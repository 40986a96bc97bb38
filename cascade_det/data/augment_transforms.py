"""The entries of an augmentation that look at one image only, by ``torchvision.transforms.v2``.

torchvision draws the parameters and moves images and bitmaps. Boxes and polygons follow by the
matrix of the same transform: torchvision has no polygons, and puts the boxes of a rotation that
enlarges the image up to a pixel beside it. All randomness comes from torch's global generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from cascade_det.data.scene import Matrix, Scene, transformed_boxes

# Parameters of a transform, as torchvision draws them.
Parameters = dict[str, Any]
# The matrix [2, 3] of a transform, from its parameters and the sizes before and after.
MatrixOf = Callable[[Parameters, tuple[int, int], tuple[int, int]], Matrix]
Apply = Callable[[Scene], Scene]


class _GaussianBlur(v2.GaussianBlur):
    """Blurs small images as well: torch mirrors no more than the image at its borders."""

    def transform(self, image: Any, params: Parameters) -> Any:
        height, width = image.shape[-2:]
        sizes = zip(self.kernel_size, (width, height), strict=True)
        kernel = [min(size, 2 * side - 1) for size, side in sizes]
        return functional.gaussian_blur(image, kernel, **params)


PHOTOMETRIC = {
    "RandomPhotometricDistort": v2.RandomPhotometricDistort,
    "ColorJitter": v2.ColorJitter,
    "RandomGrayscale": v2.RandomGrayscale,
    "GaussianBlur": _GaussianBlur,
    "GaussianNoise": v2.GaussianNoise,
    "JPEG": v2.JPEG,
}
# Its probability is that of each of its parts.
_WITH_OWN_PROBABILITY = "RandomPhotometricDistort"


def build_transform(name: str, arguments: dict[str, Any]) -> Apply:
    """The function of an entry; it changes a scene with its probability ``p``.

    Args:
        name: of the entry.
        arguments: all of the entry, checked.
    """
    arguments = {key: _as_tuple(value) for key, value in arguments.items()}
    probability = 1.0 if name == _WITH_OWN_PROBABILITY else arguments.pop("p", 1.0)
    if name in PHOTOMETRIC:
        if name == "RandomGrayscale":
            arguments = {"p": 1.0}
        apply: Apply = partial(_recolor, PHOTOMETRIC[name](**arguments))
    else:
        apply = _GEOMETRIC[name](**arguments)
    # Not a closure: workers that are not forked get the functions pickled.
    return partial(_sometimes, probability, apply)


def _sometimes(probability: float, apply: Apply, scene: Scene) -> Scene:
    return apply(scene) if float(torch.rand(())) < probability else scene


def _recolor(transform: v2.Transform, scene: Scene) -> Scene:
    """The scene after a photometric transform."""
    image = tv_tensors.Image(scene.image)
    changed = transform.transform(image, transform.make_params([image]))
    return replace(scene, image=_plain(changed))


def _move(transform: v2.Transform, matrix_of: MatrixOf, scene: Scene) -> Scene:
    """The scene after a geometric transform."""
    image = tv_tensors.Image(scene.image)
    boxes = tv_tensors.BoundingBoxes(
        torch.from_numpy(scene.boxes), format="XYXY", canvas_size=scene.size
    )
    parameters = transform.make_params([image, boxes])
    moved = _plain(transform.transform(image, parameters))

    def move_bitmaps(bitmaps: torch.Tensor) -> torch.Tensor:
        masks = tv_tensors.Mask(bitmaps.to(torch.uint8))
        return _plain(transform.transform(masks, parameters)) > 0

    if "is_within_crop_area" in parameters:
        scene = scene.select(parameters["is_within_crop_area"].numpy())
    matrix = matrix_of(parameters, scene.size, (moved.shape[1], moved.shape[2]))
    return scene.moved(moved, transformed_boxes(scene.boxes, matrix), matrix, move_bitmaps)


def _affine(degrees: Any, translate: Any, scale: Any, shear: Any, fill: int) -> Apply:
    transform = v2.RandomAffine(
        degrees,
        translate=translate,
        scale=scale,
        shear=shear,
        interpolation=InterpolationMode.BILINEAR,
        fill=_fill(fill),
    )
    return partial(_move, transform, _affine_matrix)


def _rotation(degrees: Any, expand: bool, fill: int) -> Apply:
    transform = v2.RandomRotation(
        degrees, interpolation=InterpolationMode.BILINEAR, expand=expand, fill=_fill(fill)
    )
    return partial(_move, transform, _rotation_matrix)


def _iou_crop(**arguments: Any) -> Apply:
    return partial(_crop_by_iou, v2.RandomIoUCrop(**arguments))


def _crop_by_iou(transform: v2.RandomIoUCrop, scene: Scene) -> Scene:
    # Without an object torchvision would look for one for ever; with less than a pixel it divides
    # by zero.
    if not len(scene.boxes) or int(min(scene.size) * transform.min_scale) < 1:
        return scene
    return _move(transform, _crop_matrix, scene)


def _scale_jitter(target_size: tuple[int, int], scale_range: tuple[float, float]) -> Apply:
    height, width = target_size
    transform = _ScaleJitter((width, height), scale_range)  # torchvision takes the width first
    return partial(_move, transform, _resize_matrix)


class _ScaleJitter(v2.ScaleJitter):
    """Leaves something: torch cannot resize to a single pixel."""

    def make_params(self, flat_inputs: list[Any]) -> Parameters:
        size = super().make_params(flat_inputs)["size"]
        return {"size": tuple(max(side, 2) for side in size)}


def _random_crop(size: tuple[int, int], pad_if_needed: bool, fill: int) -> Apply:
    return partial(_crop_to, size, pad_if_needed, fill)


def _crop_to(size: tuple[int, int], pad_if_needed: bool, fill: int, scene: Scene) -> Scene:
    if not pad_if_needed:
        size = (min(size[0], scene.size[0]), min(size[1], scene.size[1]))
    transform = v2.RandomCrop(size, pad_if_needed=pad_if_needed, fill=_fill(fill))
    return _move(transform, _padded_crop_matrix, scene)


def _affine_matrix(p: Parameters, old: tuple[int, int], new: tuple[int, int]) -> Matrix:
    """Shear, scale and rotation about the centre, then the shift; torchvision's conventions."""
    angle, (shear_x, shear_y) = math.radians(p["angle"]), map(math.radians, p["shear"])
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    along_y = np.array([[1, 0], [-math.tan(shear_y), 1]])
    along_x = np.array([[1, -math.tan(shear_x)], [0, 1]])
    linear = p["scale"] * rotation @ along_y @ along_x
    return _about_centres(linear, old, new, np.array(p["translate"], np.float64))


def _rotation_matrix(p: Parameters, old: tuple[int, int], new: tuple[int, int]) -> Matrix:
    angle = math.radians(p["angle"])  # anticlockwise, where y points down
    linear = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return _about_centres(linear, old, new, np.zeros(2))


def _about_centres(
    linear: Matrix, old: tuple[int, int], new: tuple[int, int], shift: Matrix
) -> Matrix:
    before, after = (np.array(size[::-1]) / 2 for size in (old, new))
    return np.column_stack([linear, after + shift - linear @ before])


def _crop_matrix(p: Parameters, old: tuple[int, int], new: tuple[int, int]) -> Matrix:
    return np.array([[1.0, 0, -p.get("left", 0)], [0, 1, -p.get("top", 0)]])


def _padded_crop_matrix(p: Parameters, old: tuple[int, int], new: tuple[int, int]) -> Matrix:
    left, top, *_ = p["padding"]
    return np.array([[1.0, 0, left - p["left"]], [0, 1, top - p["top"]]])


def _resize_matrix(p: Parameters, old: tuple[int, int], new: tuple[int, int]) -> Matrix:
    return np.array([[new[1] / old[1], 0, 0], [0, new[0] / old[0], 0]])


def _flip_matrix(axis: int, p: Parameters, old: tuple[int, int], new: tuple[int, int]) -> Matrix:
    """``axis`` is 0 to exchange left and right, 1 for top and bottom."""
    flipped = np.eye(2, 3)
    flipped[axis, [axis, 2]] = -1, old[1 - axis]
    return flipped


def _flip(transform: v2.Transform, axis: int) -> Apply:
    return partial(_move, transform, partial(_flip_matrix, axis))


def _fill(level: int) -> dict[Any, int]:
    return {tv_tensors.Image: level, "others": 0}


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(torch.Tensor)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


_GEOMETRIC: dict[str, Callable[..., Apply]] = {
    "RandomAffine": _affine,
    "RandomRotation": _rotation,
    "RandomIoUCrop": _iou_crop,
    "ScaleJitter": _scale_jitter,
    "RandomCrop": _random_crop,
    "RandomHorizontalFlip": partial(_flip, v2.RandomHorizontalFlip(1), 0),
    "RandomVerticalFlip": partial(_flip, v2.RandomVerticalFlip(1), 1),
}
