"""Data sets written by tests, and the location of real ones."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cascade_det.data.catalog import DatasetSource


class CocoMaker:
    """Writes COCO-format data sets below a folder; the categories 7 and 3 are given unsorted."""

    categories = ({"id": 7, "name": "dog"}, {"id": 3, "name": "cat"})

    def __init__(self, folder):
        self.folder = folder

    def image(self, image_id, width=40, height=30, **changes):
        """A valid entry of "images" with changes; a change to None removes the key."""
        entry = {"id": image_id, "file_name": f"{image_id}.png", "width": width, "height": height}
        return {key: value for key, value in (entry | changes).items() if value is not None}

    def box(self, annotation_id, image_id, bbox=(5, 6, 10, 12), **changes):
        """A valid entry of "annotations" with changes; a change to None removes the key."""
        entry = {"id": annotation_id, "image_id": image_id, "category_id": 3, "bbox": list(bbox)}
        return {key: value for key, value in (entry | changes).items() if value is not None}

    def write(self, images, annotations=(), *, name="set", categories=categories):
        """Write ``name.json``, and a picture for every image with its usual name and size.

        ``annotations`` or ``categories`` of None leave the key out.
        """
        content = {"images": images, "categories": categories, "annotations": annotations}
        content = {key: value for key, value in content.items() if value is not None}
        source = self.write_text(json.dumps(content), name=name)
        self.draw(source, [entry for entry in images if self._is_usual(entry)])
        return source

    def _is_usual(self, image):
        return image.get("file_name") == f"{image['id']}.png" and all(
            type(image.get(side)) is int and image[side] > 0 for side in ("height", "width")
        )

    def write_text(self, text, *, name="set"):
        """Write any text as the json."""
        root = self.folder / name
        root.mkdir(exist_ok=True)
        json_file = self.folder / f"{name}.json"
        json_file.write_text(text)
        return DatasetSource(name, json_file, root)

    def draw(self, source, images):
        """Write a picture of noise for each image."""
        for image in images:
            size = (image["height"], image["width"], 3)
            generator = np.random.default_rng(list(str(image["id"]).encode()))
            pixels = generator.integers(0, 256, size, np.uint8)
            Image.fromarray(pixels).save(source.image_root / image["file_name"])


def edit_json(path, edit):
    """Let ``edit(content)`` change a json."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def turn_names(content):
    """Give the categories of a json their names in the opposite order."""
    names = [category["name"] for category in content["categories"]]
    for category, name in zip(content["categories"], reversed(names), strict=True):
        category["name"] = name


def damage(path):
    """Overwrite the middle of an image, which only decoding finds."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 60] = bytes(60)
    path.write_bytes(content)


def draw_noise(path, height=96, width=128):
    """An image that compresses so badly that its pixels are all over the file."""
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def coco(tmp_path):
    return CocoMaker(tmp_path)


@pytest.fixture
def bccd():
    """The folder of the real blood-cell data set."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("CASCADE_DET_TEST_DATA", default)) / "bccd"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder
