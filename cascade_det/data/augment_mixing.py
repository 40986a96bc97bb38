"""The entries of an augmentation that put images together: copy-paste and mosaic.

All randomness comes from torch's global generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from cascade_det.data.scene import Scene, SceneMask, bitmap_of

# Returns another scene.
Other = Callable[[], Scene]
Mix = Callable[[Scene, Other], Scene]

MIXES = ("CopyPaste", "Mosaic")


def build_mix(name: str, arguments: dict[str, Any]) -> Mix:
    """The function of an entry; it changes a scene with its probability ``p``.

    Args:
        name: of the entry.
        arguments: all of the entry, checked.
    """
    if name == "CopyPaste":
        return partial(_copy_paste, arguments["p"], arguments["share"])
    size, center = tuple(arguments["size"]), tuple(arguments["center"])
    return partial(_mosaic, arguments["p"], size, center)


def _copy_paste(probability: float, share: float, scene: Scene, other: Other) -> Scene:
    if float(torch.rand(())) >= probability:
        return scene
    return copy_paste(scene, other(), share)


def _mosaic(
    probability: float,
    size: tuple[int, int],
    center: tuple[float, float],
    scene: Scene,
    other: Other,
) -> Scene:
    if float(torch.rand(())) >= probability:
        return scene
    return mosaic([scene, other(), other(), other()], size, center)


def copy_paste(scene: Scene, source: Scene, share: float) -> Scene:
    """Paste objects of ``source`` onto ``scene`` (Simple Copy-Paste, arXiv 2012.07177).

    The images keep their sizes; the smaller lies at a random place within the larger. Objects below
    lose what is covered, and are dropped with their last pixel. One whose mask is unknown is
    dropped if its whole box is covered.

    Args:
        scene: with masks.
        source: with masks; an object whose mask is unknown is not pasted.
        share: the probability of each object to be pasted.
    """
    assert scene.masks is not None
    height, width = scene.size
    source = _laid_over(source, height, width)
    assert source.masks is not None
    known = np.array([mask is not None for mask in source.masks], np.bool_)
    pasted = source.select(known & (torch.rand(len(known)) < share).numpy())
    assert pasted.masks is not None
    above = [bitmap_of(mask, height, width) for mask in pasted.masks if mask is not None]
    if not above:
        return scene
    covered = np.logical_or.reduce(above)
    below = _uncovered(scene, covered)
    assert below.masks is not None
    return Scene(
        torch.where(torch.from_numpy(covered), pasted.image, below.image),
        np.concatenate([below.boxes, pasted.boxes]),
        np.concatenate([below.classes, pasted.classes]),
        [*below.masks, *pasted.masks],
    )


def mosaic(scenes: list[Scene], size: tuple[int, int], center: tuple[float, float]) -> Scene:
    """Put four scenes together on a canvas (mosaic of YOLOv4, arXiv 2004.10934).

    They meet at a random point. Each is scaled until it covers its part, and cut to it at a random
    place.

    Args:
        scenes: of the upper left, upper right, lower left and lower right part.
        size: height and width of the canvas, 4 pixels or more each.
        center: the range of the point, as shares of height and width.
    """
    low, high = center
    # Parts of 2 pixels or more: torch cannot resize to a single one.
    shares = low + (high - low) * torch.rand(2)
    rows, columns = (
        (0, min(max(round(float(share) * side), 2), side - 2), side)
        for share, side in zip(shares, size, strict=True)
    )
    tiles = []
    for number, scene in enumerate(scenes):
        row, column = divmod(number, 2)
        top, left = rows[row], columns[column]
        tile = _covering(scene, rows[row + 1] - top, columns[column + 1] - left)
        tiles.append(_on_canvas(tile, top, left, size))
    images = (tile.image for tile in tiles)  # each black outside its part
    masks: list[SceneMask] | None = None
    if all(tile.masks is not None for tile in tiles):
        masks = [mask for tile in tiles for mask in tile.masks or ()]
    return Scene(
        torch.stack(tuple(images)).amax(dim=0),
        np.concatenate([tile.boxes for tile in tiles]),
        np.concatenate([tile.classes for tile in tiles]),
        masks,
    )


def _laid_over(scene: Scene, height: int, width: int) -> Scene:
    """The scene on an image of another size, black around it, at a random place."""
    top, left = (
        _between(min(0, whole - own), max(0, whole - own))
        for whole, own in zip((height, width), scene.size, strict=True)
    )
    part = scene.cropped(
        max(-top, 0), max(-left, 0), min(scene.size[0], height), min(scene.size[1], width)
    )
    return _on_canvas(part, max(top, 0), max(left, 0), (height, width))


def _covering(scene: Scene, height: int, width: int) -> Scene:
    """A part of the scene of the given size, scaled as little as covers it."""
    own_height, own_width = scene.size
    scale = max(height / own_height, width / own_width)
    size = (max(round(own_height * scale), height), max(round(own_width * scale), width))
    resized = _resized(scene, size)
    top, left = _between(0, size[0] - height), _between(0, size[1] - width)
    return resized.cropped(top, left, height, width)


def _resized(scene: Scene, size: tuple[int, int]) -> Scene:
    scale_y, scale_x = (new / old for new, old in zip(size, scene.size, strict=True))

    def move_bitmaps(bitmaps: Tensor) -> Tensor:
        nearest = InterpolationMode.NEAREST
        resized: Tensor = functional.resize(bitmaps.to(torch.uint8), list(size), nearest)
        return resized > 0

    return scene.moved(
        functional.resize(scene.image, list(size), antialias=True),
        scene.boxes * ([scale_x, scale_y] * 2),
        np.array([[scale_x, 0, 0], [0, scale_y, 0]]),
        move_bitmaps,
    )


def _on_canvas(scene: Scene, top: int, left: int, size: tuple[int, int]) -> Scene:
    """The scene within a larger black image."""
    below, right = size[0] - top - scene.size[0], size[1] - left - scene.size[1]

    def pad(images: Tensor) -> Tensor:
        return torch.nn.functional.pad(images, (left, right, top, below))

    return scene.moved(
        pad(scene.image),
        scene.boxes + [left, top] * 2,
        np.array([[1.0, 0, left], [0, 1, top]]),
        pad,
    )


def _uncovered(scene: Scene, covered: np.ndarray) -> Scene:
    """The scene with the masks and boxes that are left outside a bitmap ``[H, W]``."""
    assert scene.masks is not None
    masks: list[SceneMask] = []
    for mask, box in zip(scene.masks, scene.boxes, strict=True):
        bitmap = _box_bitmap(box, covered) if mask is None else bitmap_of(mask, *covered.shape)
        left = bitmap & ~covered
        if mask is None:
            masks.append(None if left.any() else left)
        else:
            masks.append(mask if (left == bitmap).all() and left.any() else left)
    kept = np.array([mask is None or isinstance(mask, list) or mask.any() for mask in masks])
    return replace(scene, masks=masks).select(kept.astype(np.bool_))


def _box_bitmap(box: np.ndarray, like: np.ndarray) -> np.ndarray:
    """The pixels that a box touches."""
    (left, top), (right, bottom) = np.floor(box[:2]).astype(int), np.ceil(box[2:]).astype(int)
    bitmap = np.zeros_like(like)
    bitmap[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = True
    return bitmap


def _between(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))
