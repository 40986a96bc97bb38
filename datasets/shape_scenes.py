"""Draw scenes of simple shapes with their boxes and masks, easy and hard ones.

A scene holds rotated and squeezed shapes of six classes and 8 to 200 px, overlapping, flat or
textured, over lines, blobs and fragments of contours that are not objects. An *easy* scene is clear
and sparse. A *hard* one is crowded, blurred, noisy, unevenly lit and low in contrast.

H, W = height and width of the image. An *outline* is float64 ``[P, 2]``, the (x, y) corners of a
polygon in pixels, where pixel (i, j) covers ``[i, i + 1) x [j, j + 1)``. A *canvas* is float32
``[H, W, 3]``, BGR grey levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

CLASSES = ("circle", "square", "triangle", "star", "cross", "ring")
# BGR. Colour helps to learn the classes quickly, but only shape separates them.
TYPICAL_COLOURS = {
    "circle": (40, 40, 230),
    "square": (230, 70, 40),
    "triangle": (50, 200, 50),
    "star": (30, 220, 240),
    "cross": (220, 40, 220),
    "ring": (235, 225, 40),
}
SPLITS = ("train", "val")
MIN_SIZE, MAX_SIZE = 8.0, 200.0
MIN_VISIBLE = 0.3
FINENESS = 4  # masks are supersampled by this factor

# Raise it with every change to the pixels or annotations of a seed, so that old folders are
# replaced.
DRAWING_VERSION = 2

Array = NDArray[Any]
Range = tuple[float, float]


@dataclass(frozen=True)
class Look:
    """What makes a scene easy or hard. Ranges are drawn from uniformly.

    Attributes:
        objects: fewest and most objects that are tried.
        contrast: distance of an object's colour from what lies behind it, in grey levels.
        typical: probability that an object leans towards the colour of its class.
        textured: probability that an object has a texture and not one colour.
        max_covered: largest part of an object that later ones may hide.
        clutter: fewest and most things behind the objects that are none.
        scratches: fewest and most thin lines in front of the objects.
        shading: strength of the uneven light; 0.5 darkens one side by half.
        blur: standard deviation of the blur, in pixels.
        noise: standard deviation of the noise, in grey levels.
    """

    objects: tuple[int, int]
    contrast: Range
    typical: float
    textured: float
    max_covered: float
    clutter: tuple[int, int]
    scratches: tuple[int, int]
    shading: Range
    blur: Range
    noise: Range


LOOKS = {
    "easy": Look(
        objects=(3, 6),
        contrast=(110, 200),
        typical=0.95,
        textured=0.25,
        max_covered=0.2,
        clutter=(0, 4),
        scratches=(0, 0),
        shading=(0.0, 0.2),
        blur=(0.0, 0.7),
        noise=(1, 5),
    ),
    "hard": Look(
        objects=(5, 9),
        contrast=(45, 130),
        typical=0.75,
        textured=0.6,
        max_covered=0.55,
        clutter=(5, 14),
        scratches=(0, 3),
        shading=(0.2, 0.55),
        blur=(0.6, 2.0),
        noise=(6, 18),
    ),
}


class Scene(NamedTuple):
    """A drawn scene.

    Attributes:
        image: uint8 ``[H, W, 3]``, BGR.
        annotations: one dict per object with ``category_id`` (1 = first of ``CLASSES``), ``bbox``
            (XYWH in pixels, tight around what lies inside the image, hidden parts too), ``area``
            (of the box), ``iscrowd`` 0, ``visibility`` (0.3..1), ``segmentation`` (compressed RLE
            of the pixels that no other shape covers). Shapes that are less visible are drawn and
            not annotated. Can be empty.
        difficulty: "easy" or "hard".
        labels: uint8 ``[H, W]``, the ``category_id`` of the shape in front at each pixel, less
            visible shapes included; 0 = background.
    """

    image: Array
    annotations: list[dict[str, Any]]
    difficulty: str
    labels: Array


def make_image(
    seed: int, split: str, index: int, **scene: Any
) -> tuple[Array, list[dict[str, Any]], str]:
    """The image, annotations and difficulty of :func:`make_scene`."""
    return make_scene(seed, split, index, **scene)[:3]


def make_scene(
    seed: int, split: str, index: int, *, width: int = 320, height: int = 256, hard: float = 0.2
) -> Scene:
    """Draw one scene.

    Args:
        seed: of the data set, >= 0.
        split: "train" or "val".
        index: of the image in its split, >= 0.
        width: of the image, pixels.
        height: of the image, pixels.
        hard: probability that the scene is a hard one, 0..1.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    difficulty = "hard" if rng.random() < hard else "easy"
    look = LOOKS[difficulty]
    canvas = _background(rng, width, height)
    for _ in range(rng.integers(*look.clutter, endpoint=True)):
        _draw_clutter(rng, canvas)
    shapes, owner = _draw_objects(rng, canvas, look)
    for _ in range(rng.integers(*look.scratches, endpoint=True)):
        _draw_line(rng, canvas, _any_colour(rng), thickness=1)
    image = _photograph(rng, canvas, look)
    annotations = [_annotation(shape, owner == number) for number, shape in enumerate(shapes)]
    annotations = [a for a in annotations if a["visibility"] >= MIN_VISIBLE]
    # Owner -1, no shape, is the last item.
    category_of = np.array([*(shape.label + 1 for shape in shapes), 0], np.uint8)
    return Scene(image, annotations, difficulty, category_of[owner])


# ---------------------------------------------------------------- objects


@dataclass(frozen=True)
class Shape:
    """One object: its class (0 = first of ``CLASSES``), outline, and hole if it has one."""

    label: int
    outline: Array
    hole: Array | None

    @property
    def area(self) -> float:
        """Square pixels inside the outline and outside the hole, the image's border ignored."""
        hole = 0.0 if self.hole is None else cv2.contourArea(self.hole.astype(np.float32))
        return cv2.contourArea(self.outline.astype(np.float32)) - hole


def _draw_objects(rng: Generator, canvas: Array, look: Look) -> tuple[list[Shape], Array]:
    """Draw objects into ``canvas``; also return the object index of each pixel (-1: none)."""
    shapes: list[Shape] = []
    owner = np.full(canvas.shape[:2], -1)
    for _ in range(rng.integers(*look.objects, endpoint=True)):
        placed = _place(rng, shapes, owner, look.max_covered)
        if placed is None:
            continue
        shape, mask = placed
        _fill(rng, canvas, mask, look, CLASSES[shape.label])
        owner[mask > 0.5] = len(shapes)
        shapes.append(shape)
    return shapes, owner


def _place(
    rng: Generator, shapes: list[Shape], owner: Array, max_covered: float
) -> tuple[Shape, Array] | None:
    """A shape that hides no earlier one by more than ``max_covered``, and its mask."""
    height, width = owner.shape
    for _ in range(12):
        shape = _random_shape(rng, width, height)
        mask = _mask(shape, height, width)
        inside = mask > 0.5
        remaining = np.bincount(owner[~inside] + 1, minlength=len(shapes) + 1)[1:]
        areas = np.array([max(other.area, 1.0) for other in shapes])
        hides_too_much = remaining < (1 - max_covered) * areas
        # Only shapes that this one touches: the border may have cut others before.
        touched = np.bincount(owner[inside] + 1, minlength=len(shapes) + 1)[1:] > 0
        if not (hides_too_much & touched).any() and inside.sum() >= MIN_VISIBLE * shape.area:
            return shape, mask
    return None


def _random_shape(rng: Generator, width: int, height: int) -> Shape:
    label = int(rng.integers(len(CLASSES)))
    corners, hole = OUTLINES[CLASSES[label]]()
    angle = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turn = rotation * np.array([1.0, rng.uniform(0.6, 1.0)])
    corners = corners @ turn.T
    low, high = corners.min(0), corners.max(0)
    scale = min(_random_size(rng), 0.8 * min(width, height)) / (high - low).max()
    centre = rng.uniform(0.04, 0.96, 2) * (width, height)
    middle = (low + high) / 2
    outline = (corners - middle) * scale + centre
    if hole is not None:
        hole = (hole @ turn.T - middle) * scale + centre
    return Shape(label, outline, hole)


def _random_size(rng: Generator) -> float:
    """Longest side of the box in pixels: 65% in 40..110, the rest smaller and larger."""
    low, high = [(MIN_SIZE, 40), (40, 110), (110, MAX_SIZE)][rng.choice(3, p=[0.1, 0.65, 0.25])]
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _circle(radius: float = 1.0) -> Array:
    turns = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    return radius * np.stack([np.cos(turns), np.sin(turns)], 1)


def _regular(corners: int, inner: float | None = None) -> Array:
    """A regular polygon; with ``inner``, a star whose inner corners have that radius."""
    count = corners if inner is None else 2 * corners
    radii = np.ones(count)
    if inner is not None:
        radii[1::2] = inner
    turns = np.arange(count) * 2 * np.pi / count
    return radii[:, None] * np.stack([np.cos(turns), np.sin(turns)], 1)


def _cross(arm: float = 0.36) -> Array:
    corner = np.array([[1.0, arm], [arm, arm], [arm, 1.0]])
    quarter = np.array([[0.0, -1.0], [1.0, 0.0]])
    turned = [corner @ np.linalg.matrix_power(quarter, k).T for k in range(4)]
    return np.concatenate(turned)


# Outline and hole of each class, around the origin.
OUTLINES: dict[str, Callable[[], tuple[Array, Array | None]]] = {
    "circle": lambda: (_circle(), None),
    "square": lambda: (_regular(4), None),
    "triangle": lambda: (_regular(3), None),
    "star": lambda: (_regular(5, inner=0.42), None),
    "cross": lambda: (_cross(), None),
    "ring": lambda: (_circle(), _circle(0.58)),
}


def _mask(shape: Shape, height: int, width: int) -> Array:
    """Coverage of each pixel by the shape: float32 ``[H, W]`` in 0..1."""
    # OpenCV's own smooth edges make a polygon half a pixel too large on every side.
    fine = np.zeros((height * FINENESS, width * FINENESS), np.uint8)
    _fill_polygon(fine, shape.outline * FINENESS, 255)
    if shape.hole is not None:
        _fill_polygon(fine, shape.hole * FINENESS, 0)
    mask = cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)
    return mask.astype(np.float32) / 255


def _fill_polygon(canvas: Array, outline: Array, colour: int) -> None:
    # OpenCV puts whole numbers at the centres of pixels and takes fractions as fixed point.
    points = np.round((outline - 0.5) * 16).astype(np.int32)
    cv2.fillPoly(canvas, [points], [colour], shift=4)


def _annotation(shape: Shape, visible: Array) -> dict[str, Any]:
    height, width = visible.shape
    inside = _cut(shape.outline, width, height)
    (x0, y0), (x1, y1) = inside.min(0), inside.max(0)
    box = [round(float(v), 2) for v in (x0, y0, x1 - x0, y1 - y0)]
    return {
        "category_id": shape.label + 1,
        "bbox": box,
        "area": round(box[2] * box[3], 2),
        "iscrowd": 0,
        "visibility": round(min(1.0, float(visible.sum()) / max(shape.area, 1.0)), 3),
        "segmentation": _rle(visible),
    }


def _rle(mask: Array) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def _cut(outline: Array, width: int, height: int) -> Array:
    """The corners of what lies inside the image (Sutherland and Hodgman's clipping)."""
    for axis, border, sign in ((0, 0, 1), (0, width, -1), (1, 0, 1), (1, height, -1)):
        depth = sign * (outline[:, axis] - border)
        following, next_depth = np.roll(outline, -1, axis=0), np.roll(depth, -1)
        inside = depth >= 0
        crosses = inside != (next_depth >= 0)
        part = depth / np.where(crosses, depth - next_depth, 1.0)
        crossings = outline + part[:, None] * (following - outline)
        candidates = np.stack([outline, crossings], 1).reshape(-1, 2)
        outline = candidates[np.stack([inside, crosses], 1).ravel()]
    return outline


# ---------------------------------------------------------------- paint and light


def _background(rng: Generator, width: int, height: int) -> Array:
    """A soft field of colour: float32 ``[H, W, 3]``, BGR grey levels."""
    cells = int(rng.integers(2, 6))
    grey, tint = rng.uniform(40, 215), rng.normal(0, 12, 3)
    coarse = rng.normal(0, rng.uniform(4, 18), (cells, cells, 3)) + grey + tint
    return cv2.resize(coarse.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)


def _fill(rng: Generator, canvas: Array, mask: Array, look: Look, name: str) -> None:
    """Blend a colour or a texture into ``canvas`` where ``mask`` (float32 ``[H, W]``) is."""
    x, y, width, height = cv2.boundingRect((mask > 0).astype(np.uint8))
    window = canvas[y : y + height, x : x + width]
    cover = mask[y : y + height, x : x + width, None]
    behind = (window * cover).sum((0, 1)) / cover.sum()
    contrast = rng.uniform(*look.contrast)
    if rng.random() < look.typical:
        colour = TYPICAL_COLOURS[name] + rng.normal(0, 25, 3) - behind
        distance = float(np.linalg.norm(colour))
        paint = behind + min(1.0, contrast / max(distance, 1.0)) * colour
    else:
        paint = _contrasting(rng, behind, contrast)
    if rng.random() < look.textured:
        amplitude = rng.uniform(0.2, 0.5) * contrast
        paint = paint + amplitude * _texture(rng, height, width)[..., None]
    window += cover * (paint - window)


def _contrasting(rng: Generator, behind: Array, contrast: float) -> Array:
    """A colour whose distance from ``behind`` comes closest to ``contrast``, of 16 tries."""
    directions = rng.normal(size=(16, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    colours = np.clip(behind + contrast * directions, 0, 255)
    distances = np.linalg.norm(colours - behind, axis=1)
    return colours[np.abs(distances - contrast).argmin()]


def _texture(rng: Generator, height: int, width: int) -> Array:
    """Stripes, checks or grain: float32 ``[H, W]`` in about -1..1."""
    kind = rng.integers(3)
    if kind == 2:
        coarse = rng.uniform(-1, 1, (height // 3 + 1, width // 3 + 1)).astype(np.float32)
        return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 16)
    y, x = np.mgrid[:height, :width] * (2 * np.pi / period)
    along = np.sin(x * np.cos(angle) + y * np.sin(angle))
    if kind == 0:
        return along
    return np.sign(along * np.sin(y * np.cos(angle) - x * np.sin(angle)))


def _draw_clutter(rng: Generator, canvas: Array) -> None:
    """Draw a line, a soft blob, or a piece of a shape's contour: nothing that is an object."""
    colour = _any_colour(rng)
    kind = rng.integers(3)
    if kind == 0:
        _draw_line(rng, canvas, colour, thickness=int(rng.integers(1, 4)))
    elif kind == 1:
        _draw_blob(rng, canvas, colour)
    else:
        outline = _random_shape(rng, canvas.shape[1], canvas.shape[0]).outline
        start, length = rng.integers(len(outline)), max(2, len(outline) // 2)
        piece = np.roll(outline, -start, axis=0)[:length]
        points = np.round(piece * 16).astype(np.int32)
        thickness = int(rng.integers(1, 3))
        cv2.polylines(canvas, [points], False, colour, thickness, cv2.LINE_AA, shift=4)


def _draw_line(rng: Generator, canvas: Array, colour: Sequence[float], *, thickness: int) -> None:
    height, width = canvas.shape[:2]
    ends = rng.uniform(-0.1, 1.1, (2, 2)) * (width, height)
    (x0, y0), (x1, y1) = ends.astype(int).tolist()
    cv2.line(canvas, (x0, y0), (x1, y1), colour, thickness, cv2.LINE_AA)


def _draw_blob(rng: Generator, canvas: Array, colour: Sequence[float]) -> None:
    """Blend in a spot without an edge."""
    height, width = canvas.shape[:2]
    (cx, cy), spread = rng.uniform(0, 1, 2) * (width, height), rng.uniform(4, 30)
    along = np.exp(-((np.arange(width) - cx) ** 2) / (2 * spread**2))
    down = np.exp(-((np.arange(height) - cy) ** 2) / (2 * spread**2))
    weight = 0.7 * np.outer(down, along)[..., None].astype(np.float32)
    canvas += weight * (np.array(colour, np.float32) - canvas)


def _any_colour(rng: Generator) -> list[float]:
    return rng.uniform(0, 255, 3).tolist()


def _photograph(rng: Generator, canvas: Array, look: Look) -> Array:
    """Light, blur and noise: float32 ``[H, W, 3]`` to uint8 of the same shape."""
    height, width = canvas.shape[:2]
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.ogrid[:height, :width]
    along = np.cos(angle) * (x / width - 0.5) + np.sin(angle) * (y / height - 0.5)
    light = 1 - rng.uniform(*look.shading) * (along + 0.5)
    image = canvas * light[..., None].astype(np.float32)
    blur = rng.uniform(*look.blur)
    if blur > 0.2:
        image = cv2.GaussianBlur(image, (0, 0), blur)
    grain = rng.standard_normal(image.shape, dtype=np.float32)
    image = image + np.float32(rng.uniform(*look.noise)) * grain
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
