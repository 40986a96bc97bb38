"""Distinct colours for the classes of a data set."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

Color = tuple[int, int, int]

# BGR, distinct for colour-blind people too (Okabe and Ito's set).
GREEN, ORANGE, BLUE, PURPLE, YELLOW, RED = (
    (115, 158, 0),
    (0, 159, 230),
    (178, 114, 0),
    (167, 121, 204),
    (66, 228, 240),
    (0, 94, 213),
)
_NUM_COLORS = 256


def class_color(index: int) -> Color:
    """The BGR colour of a class; colours repeat after 256 classes.

    After Okabe and Ito's six, each colour is the farthest from all earlier ones in CIELAB (Glasbey
    et al., "Colour displays for categorical images", 2007).
    """
    return _palette()[index % _NUM_COLORS]


@functools.cache
def _palette() -> tuple[Color, ...]:
    """Colours chosen greedily, so that the first ones differ most."""
    levels = np.arange(0, 256, 15)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    lab = _lab(candidates)
    # Without near-black, near-white and grey, which photographs are full of.
    colorful = (lab[:, 0] > 25) & (lab[:, 0] < 90) & (np.hypot(lab[:, 1], lab[:, 2]) > 25)
    candidates, lab = candidates[colorful], lab[colorful]
    chosen = [GREEN, ORANGE, BLUE, PURPLE, YELLOW, RED]
    nearest = np.linalg.norm(lab[:, None] - _lab(np.array(chosen)), axis=2).min(axis=1)
    while len(chosen) < _NUM_COLORS:
        # Rounded, so that all processors agree.
        best = int(nearest.round(6).argmax())
        blue, green, red = candidates[best].tolist()
        chosen.append((blue, green, red))
        nearest = np.minimum(nearest, np.linalg.norm(lab - lab[best], axis=1))
    return tuple(chosen)


def _lab(bgr: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """CIELAB ``[N, 3]`` of sRGB colours under D65 (IEC 61966-2-1, CIE 15)."""
    encoded = bgr[:, ::-1] / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    xyz = linear @ to_xyz.T / to_xyz.sum(axis=1)
    x, y, z = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
