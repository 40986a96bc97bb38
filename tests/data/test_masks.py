"""Masks from the json to the samples, with Detectron2's own reader and mapper as oracle."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from cascade_det.data import samples
from cascade_det.data.coco import load_dataset
from cascade_det.data.loader import build_test_loader, build_train_loader, training_records
from cascade_det.data.sample_masks import MaskOptions, pack, unpack
from cascade_det.data.transforms import TrainTransform
from cascade_det.errors import DatasetError

TRIANGLE = [6.0, 7.0, 14.0, 7.0, 10.0, 17.5]
SHORT = [6.0, 7.0, 14.0, 7.0]
FLAT = [6.0, 7.0, 8.0, 8.0, 10.0, 9.0]
LOADER = {"min_sizes": (45,), "max_size": 90, "image_format": "BGR", "images_per_batch": 2}


def bitmap_rle(bitmap, compressed=True):
    rle = coco_mask.encode(np.asfortranarray(bitmap, np.uint8))
    if compressed:
        return {"size": rle["size"], "counts": rle["counts"].decode()}
    changes = np.flatnonzero(np.diff(bitmap.T.ravel(), prepend=False, append=False)).tolist()
    edges = [0, *changes, bitmap.size]
    counts = np.diff(edges).tolist()
    return {"size": rle["size"], "counts": counts if counts[-1] else counts[:-1]}


def block(top=8, bottom=16, height=30, width=40):
    bitmap = np.zeros((height, width), bool)
    bitmap[top:bottom, 6:13] = True
    return bitmap


@pytest.fixture
def mixed(coco):
    """A data set with masks of every kind; the id of an object is its place below."""
    kinds = [
        [TRIANGLE],
        [TRIANGLE, [20.0, 3.0, 30.0, 3.0, 25.0, 9.0]],
        bitmap_rle(block()),
        bitmap_rle(block(), compressed=False),
        [SHORT, TRIANGLE],
        [SHORT],
        None,
        [],
        [FLAT],
        bitmap_rle(block(0, 0)),
        bitmap_rle(block()),
    ]
    boxes = [coco.box(i, 1 + i % 2, segmentation=kind) for i, kind in enumerate(kinds)]
    boxes[-1]["iscrowd"] = 1
    return coco.write([coco.image(1), coco.image(2)], boxes)


def kinds_of(dataset):
    names = {list: "polygons", dict: "rle", type(None): None}
    return [names[type(mask)] for record in dataset.records for mask in record.masks]


# -- reading --------------------------------------------------------------------------------------


def test_kinds_are_mixed_object_by_object(mixed, caplog):
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset(mixed, masks="keep")
    assert kinds_of(dataset) == [
        *("polygons", "rle", "polygons", None, None, None),  # even ids; the crowd is last
        *("polygons", "rle", None, None, None),
    ]
    assert [p.tolist() for p in dataset.records[0].masks[2]] == [TRIANGLE]
    message = "5 of 10 objects have no mask, or one of no area: only their boxes are trained on"
    assert message in caplog.text
    assert "CASCADE.MASKLESS" in caplog.text
    assert caplog.text.count("no mask") == 1


def test_objects_without_a_mask_are_dropped(mixed, caplog):
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset(mixed, masks="drop")
    assert kinds_of(dataset) == [
        *("polygons", "rle", "polygons", "polygons", None),
        *("polygons", "rle", "rle"),
    ]
    assert [record.iscrowd.tolist() for record in dataset.records] == [
        [False] * 4 + [True],
        [False] * 3,
    ]
    assert "3 of 10 objects have no mask: they are left out of training" in caplog.text


def test_images_whose_objects_were_dropped_are_not_trained_on(coco):
    boxes = [coco.box(1, 1), coco.box(2, 2, segmentation=[TRIANGLE])]
    source = coco.write([coco.image(1), coco.image(2)], boxes)
    found = {m: load_dataset(source, masks=m) for m in ("keep", "drop")}
    ids = {m: [r.image_id for r in training_records([d], True)] for m, d in found.items()}
    assert ids == {"keep": [1, 2], "drop": [2]}


def test_without_masks_nothing_of_them_is_read(mixed, caplog):
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset(mixed, keep_ground_truth=True)
    assert caplog.text == ""
    assert all(record.masks is None for record in dataset.records)
    assert "segmentation" not in json.dumps(dataset.ground_truth)


def test_bad_masks_are_bad_data(coco):
    swapped = bitmap_rle(block(height=40, width=30))
    boxes = [
        coco.box(1, 1, segmentation=swapped),
        coco.box(2, 1, segmentation=[[1, 2, 3, 4, 5, "6"]]),
        coco.box(3, 1, segmentation=[TRIANGLE]),
    ]
    source = coco.write([coco.image(1)], boxes)
    load_dataset(source)  # for boxes alone they do not matter
    with pytest.raises(DatasetError) as error:
        load_dataset(source, masks="keep")
    assert (
        "1 x mask whose RLE has another 'size' than its image, [height, width]: annotation 1"
        in str(error.value)
    )
    assert "1 x mask whose polygons are not lists of numbers" in str(error.value)
    dataset = load_dataset(source, "skip", masks="keep")
    assert kinds_of(dataset) == ["polygons"]
    assert sum(dataset.left_out.values()) == 2


def test_the_ground_truth_is_drawn_by_pycocotools(mixed):
    dataset = load_dataset(mixed, masks="keep", keep_ground_truth=True)
    content = json.loads(json.dumps(dataset.ground_truth))
    reference = COCO()
    reference.dataset = content
    reference.createIndex()
    original = COCO(str(mixed.json_file))
    with_masks = [a for a in content["annotations"] if "segmentation" in a]
    assert sorted(a["id"] for a in with_masks) == [0, 1, 2, 3, 4, 8, 9, 10]
    for annotation in with_masks:
        drawn = reference.annToMask(annotation)
        if annotation["id"] == 4:
            original.anns[4]["segmentation"] = [TRIANGLE]
        np.testing.assert_array_equal(drawn, original.annToMask(original.anns[annotation["id"]]))
        assert annotation["area"] == drawn.sum()
    assert all(a["area"] == 10 * 12 for a in content["annotations"] if a not in with_masks)


def test_the_area_of_the_json_is_kept(coco):
    source = coco.write([coco.image(1)], [coco.box(1, 1, segmentation=[TRIANGLE], area=41.5)])
    (annotation,) = load_dataset(source, masks="keep", keep_ground_truth=True).ground_truth[
        "annotations"
    ]
    assert annotation["area"] == 41.5
    assert annotation["segmentation"] == [TRIANGLE]


# -- samples --------------------------------------------------------------------------------------


def test_masks_move_with_their_image(mixed):
    dataset = load_dataset(mixed, masks="keep")
    loader = build_test_loader(dataset, **LOADER, num_workers=0, annotated=True, masks={})
    (batch,) = loader
    first, second = batch
    assert [len(s["gt_masks"]) for s in batch] == [len(s["gt_boxes"]) for s in batch] == [5, 5]
    scaled = [1.5 * x for x in TRIANGLE]
    assert first["gt_masks"][0][0].tolist() == scaled
    assert first["gt_masks"][0][0].dtype == torch.float64
    assert second["gt_masks"][0][0].tolist() == scaled
    assert len(second["gt_masks"][0]) == 2
    bitmap = first["gt_masks"][1]
    assert (bitmap.dtype, bitmap.shape) == (torch.bool, (45, 60))
    assert [m is None for m in first["gt_masks"]] == [False, False, False, True, True]


def test_bitmaps_of_no_pixel_are_unknown_or_their_objects_dropped(coco):
    thin = [6.0, 7.0, 6.001, 7.0, 6.001, 7.001]
    boxes = [coco.box(1, 1, segmentation=[thin]), coco.box(2, 1, segmentation=[TRIANGLE])]
    source = coco.write([coco.image(1)], boxes)
    found = {}
    for maskless in ("keep", "drop"):
        options = {"mask_format": "bitmask", "maskless": maskless}
        dataset = load_dataset(source, masks=maskless)
        ((sample,),) = build_test_loader(
            dataset, **LOADER, num_workers=0, annotated=True, masks=options
        )
        assert len(sample["gt_boxes"]) == len(sample["gt_classes"]) == len(sample["gt_masks"])
        found[maskless] = [mask is not None for mask in sample["gt_masks"]]
    assert found == {"keep": [False, True], "drop": [True]}


def test_workers_return_the_same_masks(mixed):
    dataset = load_dataset(mixed, masks="keep")
    arguments = LOADER | {"sampling": "choice", "flip": "horizontal", "aspect_ratio_grouping": True}
    first = []
    for workers in (0, 1):
        loader = build_train_loader(
            [dataset],
            **arguments,
            num_workers=workers,
            filter_empty=True,
            seed=5,
            masks={"mask_format": "polygon"},
        )
        batch = next(iter(loader))
        masks = [mask for sample in batch for mask in sample["gt_masks"]]
        if not workers:
            first = masks
    assert [type(mask) for mask in masks] == [type(mask) for mask in first]
    for ours, theirs in zip(masks, first, strict=True):
        if isinstance(ours, list):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        elif ours is not None:
            assert torch.equal(ours, theirs)


def test_packing_takes_at_most_one_tensor():
    bitmaps = [torch.rand(4, 5) > 0.5 for _ in range(2)]
    polygons = [torch.rand(6, dtype=torch.float64), torch.rand(8, dtype=torch.float64)]
    masks = [None, polygons, bitmaps[0], [], bitmaps[1]]
    packed = pack(masks)
    assert sum(isinstance(part, torch.Tensor) for part in packed) == 1
    back = unpack(packed)
    assert back[0] is None
    assert all(torch.equal(a, b) for a, b in zip(back[1], polygons, strict=True))
    assert torch.equal(back[2], bitmaps[0])
    assert back[3] == []
    assert torch.equal(back[4], bitmaps[1])
    assert unpack(pack([])) == []


def test_samples_without_truth_have_no_masks(mixed):
    dataset = load_dataset(mixed, masks="keep")
    (batch,) = build_test_loader(dataset, **LOADER, num_workers=0, masks={})
    assert all("gt_masks" not in sample for sample in batch)


# -- Detectron2 -----------------------------------------------------------------------------------


def random_set(coco, generator, with_rle):
    """Objects with masks as people draw them, and some that Detectron2 leaves out."""
    images, boxes = [], []
    for image_id, (width, height) in enumerate([(40, 30), (23, 61), (90, 55)], start=1):
        images.append(coco.image(image_id, width, height))
        for _ in range(12):
            corner = generator.uniform(-5, 0.9 * np.array([width, height]))
            sides = generator.uniform(6, 30, 2)
            sizes = generator.integers(2, 8, generator.integers(1, 4))
            polygons = [
                (corner + generator.uniform(-0.1, 1.1, (n, 2)) * sides).ravel().tolist()
                for n in sizes
            ]
            mask = polygons
            if with_rle and generator.random() < 0.5:
                share = generator.choice([0, 0.001, 0.5])
                mask = bitmap_rle(
                    generator.random((height, width)) < share, generator.random() < 0.5
                )
            box = [*corner.tolist(), *sides.tolist()]
            boxes.append(coco.box(len(boxes), image_id, box, segmentation=mask))
            boxes[-1]["iscrowd"] = int(generator.random() < 0.1)
    return coco.write(images, boxes)


@pytest.mark.needs_detectron2
@pytest.mark.parametrize("flip", ["none", "horizontal", "vertical"])
@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_samples_are_detectron2s_to_the_bit(coco, mask_format, flip):
    d2_coco = pytest.importorskip("detectron2.data.datasets.coco", exc_type=ImportError)
    from detectron2.data import DatasetMapper
    from detectron2.data import transforms as T

    source = random_set(coco, np.random.default_rng(4), mask_format == "bitmask")
    augmentations = [T.ResizeShortestEdge((43,), 60, "choice")]
    if flip != "none":
        vertical = flip == "vertical"
        augmentations.append(T.RandomFlip(prob=1.0, horizontal=not vertical, vertical=vertical))
    mapper = DatasetMapper(
        is_train=True,
        augmentations=augmentations,
        image_format="BGR",
        use_instance_mask=True,
        instance_mask_format=mask_format,
    )
    theirs = d2_coco.load_coco_json(str(source.json_file), str(source.image_root))
    ours = load_dataset(source, masks="drop")
    assert [r.image_id for r in ours.records] == [d["image_id"] for d in theirs]
    make_ours = samples.DetectionSample(
        TrainTransform(min_sizes=(43,), max_size=60, sampling="choice", flip=flip),
        "BGR",
        MaskOptions(mask_format, "drop"),
    )
    always = SimpleNamespace(random=lambda: 0.0, choice=lambda sizes: sizes[0])
    dropped = 0
    for record, entry in zip(ours.records, theirs, strict=True):
        sample = make_ours(record, always)
        mapped = mapper(entry)
        assert torch.equal(sample["image"], mapped["image"])
        instances = mapped["instances"]
        assert torch.equal(sample["gt_boxes"], instances.gt_boxes.tensor)
        masks = sample["gt_masks"]
        dropped += 12 - len(masks)
        if mask_format == "bitmask":
            assert torch.equal(torch.stack(masks), instances.gt_masks.tensor)
            continue
        for polygons, expected in zip(masks, instances.gt_masks.polygons, strict=True):
            assert len(polygons) == len(expected)
            for polygon, points in zip(polygons, expected, strict=True):
                np.testing.assert_array_equal(polygon.numpy(), points)
    assert dropped > 3
