"""Any annotation file gives a usable data set or a ``DatasetError``."""

import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from cascade_det.data.catalog import DatasetSource
from cascade_det.data.coco import load_dataset
from cascade_det.data.dataset_summary import summarize
from cascade_det.data.image_check import check_dataset
from cascade_det.data.loader import build_test_loader, build_train_loader
from cascade_det.errors import DatasetError
from cascade_det.masks.truth import ObjectMasks

SIZE = {"min_sizes": (6,), "max_size": 20, "image_format": "BGR", "num_workers": 0}
TRAIN = SIZE | {
    "sampling": "choice",
    "flip": "horizontal",
    "images_per_batch": 2,
    "aspect_ratio_grouping": True,
    "filter_empty": True,
    "seed": 3,
}
GOOD = {
    "images": [
        {"id": 1, "file_name": "a.png", "width": 8, "height": 5},
        {"id": 2, "file_name": "b.png", "width": 4, "height": 9},
        {"id": 3, "file_name": "a.png", "width": 8, "height": 5},
    ],
    "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 1, 2, 2], "iscrowd": 0, "area": 4}
        | {"segmentation": [[1, 1, 3, 1, 2, 3], [0, 0, 1, 1]]},
        {"id": 2, "image_id": 2, "category_id": 7, "bbox": [0.5, 2, 3, 2.5], "ignore": 0}
        | {"segmentation": {"size": [9, 4], "counts": [11, 3, 6, 3, 13]}},
        {"id": 3, "image_id": 3, "category_id": 3, "bbox": [0, 0, 8, 5], "iscrowd": 1}
        | {"segmentation": {"size": [5, 8], "counts": "1410000000000000"}},
    ],
}

numbers = (
    st.integers(-2, 10)
    | st.integers()
    | st.floats()
    | st.sampled_from([2**31, 2**63, 10**40, -(10**400), 1e-300, 1e308, -0.0])
)
texts = st.text(max_size=5) | st.sampled_from(
    [
        *("a.png", "../a.png", "/", ".", "b.png/", "\0", "\ud800", "1", "x" * 5000, "id", "bbox"),
        *("segmentation", "counts", "0X", "PPPPPPPPPP"),
    ]
)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(texts | st.sampled_from(["id"]), inner)
    ),
    max_leaves=8,
)

bad_data = st.sampled_from(["error", "skip", "skip"])
masks = st.sampled_from([None, "keep", "drop"])


@st.composite
def spoilt_contents(draw):
    """Good content in which entries were replaced, removed or repeated."""
    content = json.loads(json.dumps(GOOD))
    for _ in range(draw(st.integers(1, 5))):
        place = content
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and draw(st.integers(0, 3)):
                place = place[key]
                continue
            _spoil(draw, place, key)
            break
    return json.dumps(content).encode()


def _spoil(draw, place, key):
    how = draw(st.sampled_from(["replace", "take out", "repeat"]))
    if how == "replace":
        place[key] = draw(values)
    elif how == "take out":
        del place[key]
    elif isinstance(place, list):
        place.append(place[key])
    else:
        place[draw(texts)] = place[key]


@st.composite
def spoilt_bytes(draw):
    """The bytes of a good file with pieces replaced, or cut off."""
    data = json.dumps(GOOD).encode(draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 6)))
        piece = draw(
            st.binary(max_size=4)
            | st.sampled_from([b"NaN", b"1e999", b"-", b"{", b"}", b"[", b'"', b"\\ud800", b"99"])
        )
        data = data[:start] + piece + data[end:]
    return data[: draw(st.just(len(data)) | st.integers(0, len(data)))]


def folder_with_images(folder):
    """The image folder that ``GOOD`` describes, and the path for its json."""
    root = Path(folder) / "images"
    root.mkdir()
    for name, size in (("a.png", (8, 5)), ("b.png", (4, 9))):
        Image.new("RGB", size).save(root / name)
    return DatasetSource("set", Path(folder) / "set.json", root)


def check_outcome(source, data, on_bad_data, maskless):
    """Every step succeeds or raises DatasetError; returns the data set if there is one."""
    source.json_file.write_bytes(data)
    try:
        checked = check_dataset(source, masks=maskless is not None)
        str(checked.bad), str(checked.unusable), str(summarize(checked).warnings)
        dataset = load_dataset(source, on_bad_data, masks=maskless, keep_ground_truth=True)
    except DatasetError as error:
        str(error).encode()
        return None
    content = json.loads(json.dumps(dataset.ground_truth, allow_nan=False))
    for annotation in content.get("annotations", []):
        if "segmentation" in annotation:
            draw_as_pycocotools(annotation, content["images"])
    arguments = SIZE | {"images_per_batch": 2}
    if maskless:
        arguments["masks"] = {"maskless": maskless}
    samples = list(itertools.chain(*build_test_loader(dataset, **arguments, annotated=True)))
    assert [sample["image_id"] for sample in samples] == [r.image_id for r in dataset.records]
    try:
        loader = build_train_loader([dataset], **(TRAIN | arguments))
    except DatasetError:
        assert not any((~record.iscrowd).any() for record in dataset.records)
    else:
        samples += itertools.chain(*itertools.islice(loader, 3))
    for sample in samples:
        check_sample(sample, len(dataset.class_names))
    return dataset


def check_sample(sample, num_classes):
    height, width = sample["image"].shape[1:]
    boxes, classes = sample["gt_boxes"], sample["gt_classes"]
    assert torch.isfinite(boxes).all()
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([width, height] * 2)).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert ((classes >= 0) & (classes < num_classes)).all()
    if "gt_masks" in sample:
        targets = ObjectMasks(sample["gt_masks"])
        known = torch.nonzero(targets.known)[:, 0]
        assert targets.crop(known, boxes[known], 7).shape == (len(known), 7, 7)
        assert len(sample["gt_masks"]) == len(boxes)


def draw_as_pycocotools(annotation, images):
    """Which crashes where a mask is not what it should be."""
    reference = COCO()
    reference.imgs = {image["id"]: image for image in images}
    assert reference.annToMask(annotation).ndim == 2


def test_the_good_content_is_good():
    with tempfile.TemporaryDirectory() as folder:
        source = folder_with_images(folder)
        dataset = check_outcome(source, json.dumps(GOOD).encode(), "error", "drop")
    kinds = [[type(mask) for mask in record.masks] for record in dataset.records]
    assert kinds == [[list], [dict], [type(None)]]
    assert [len(record.boxes) for record in dataset.records] == [1, 1, 1]
    np.testing.assert_array_equal(dataset.records[1].boxes, [[0.5, 2, 3.5, 4.5]])


@settings(max_examples=100)
@given(spoilt_contents(), bad_data, masks)
def test_any_content(data, on_bad_data, maskless):
    with tempfile.TemporaryDirectory() as folder:
        check_outcome(folder_with_images(folder), data, on_bad_data, maskless)


@settings(max_examples=60)
@given(spoilt_bytes() | st.binary(), bad_data, masks)
def test_any_bytes(data, on_bad_data, maskless):
    with tempfile.TemporaryDirectory() as folder:
        check_outcome(folder_with_images(folder), data, on_bad_data, maskless)
