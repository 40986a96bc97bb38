"""Small data sets for semantic segmentation, written by hand."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cascade_det.data.semantic import find_semantic_dataset, load_semantic_dataset

CLASSES = ("ground", "tree", "house")


def save(path, array, mode=None):
    """An array as an image file; the folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array), mode).save(path)


def labels_of(height, width, classes=3, seed=0):
    """Random labels, uint8 ``[H, W]``, every class among them."""
    labels = np.random.default_rng(seed).integers(0, classes, (height, width), np.uint8)
    labels.flat[:classes] = np.arange(classes)
    return labels


def image_of(labels):
    """An image ``[H, W, 3]`` whose grey levels are 40 times the label."""
    return np.repeat((40 * labels)[..., None], 3, axis=2)


def write_pair(folder, stem, height=6, width=8, seed=0):
    labels = labels_of(height, width, seed=seed)
    save(folder / "images" / f"{stem}.png", image_of(labels))
    save(folder / "labels" / f"{stem}.png", labels)
    return labels


def source_of(folder, kind="folders", classes=CLASSES, **rest):
    folders = [str(folder)] if kind != "folders" else [f"{folder}/images", f"{folder}/labels"]
    return find_semantic_dataset("set", [("set", kind, *folders)], class_names=classes, **rest)


def load(folder, kind="folders", on_bad_data="error", **rest):
    return load_semantic_dataset(source_of(folder, kind), on_bad_data, **rest)


@pytest.fixture
def pairs(tmp_path):
    """Five pairs of an image and its labels, "2" and "4" portrait."""
    for number in range(1, 6):
        size = (40, 24) if number in (2, 4) else (24, 40)
        write_pair(tmp_path, str(number), *size, seed=number)
    return tmp_path
