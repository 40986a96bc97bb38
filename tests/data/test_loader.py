"""Loaders end to end, on images made here and on real ones."""

import itertools
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from cascade_det.data.catalog import find_dataset
from cascade_det.data.coco import load_dataset
from cascade_det.data.loader import build_test_loader, build_train_loader
from cascade_det.data.transforms import read_image, resize_shortest_edge
from cascade_det.errors import DatasetError

TRAIN = {
    "min_sizes": (16, 24, 32),
    "max_size": 60,
    "sampling": "choice",
    "flip": "horizontal",
    "image_format": "BGR",
    "images_per_batch": 2,
    "num_workers": 0,
    "aspect_ratio_grouping": True,
    "filter_empty": True,
    "seed": 3,
}
TEST = {
    "min_sizes": (15,),
    "max_size": 60,
    "image_format": "BGR",
    "images_per_batch": 2,
    "num_workers": 0,
}


@pytest.fixture
def dataset(coco):
    """Seven images: 1 to 5 with boxes, 6 with a crowd only, 7 empty; 2 and 4 are portrait."""
    images = [
        coco.image(number, *((20, 30) if number in (2, 4) else (40, 30))) for number in range(1, 8)
    ]
    boxes = [coco.box(number, number, (2, 3, number + 5, 9)) for number in range(1, 6)]
    boxes.append(coco.box(10, 1, (0, 0, 5, 5), iscrowd=1))
    boxes.append(coco.box(11, 6, (0, 0, 9, 9), iscrowd=1))
    boxes.append(coco.box(12, 1, (10, 10, 5, 5), category_id=7))
    source = coco.write(images, boxes)
    coco.draw(source, images)
    return load_dataset(source)


def take(loader, number):
    return list(itertools.islice(loader, number))


def assert_same_batches(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, other[key], rtol=0, atol=0)
            else:
                assert value == other[key]


# -- training -------------------------------------------------------------------------------------


def test_training_samples_are_what_the_contract_says(dataset):
    for batch in take(build_train_loader([dataset], **TRAIN), 10):
        assert len(batch) == 2
        for sample in batch:
            height, width = sample["image"].shape[1:]
            assert sample["image"].dtype == torch.uint8
            assert sample["image"].is_contiguous()
            assert min(height, width) in (16, 24, 32)
            record = dataset.records[sample["image_id"] - 1]
            for key in ("height", "width", "file_name"):
                assert sample[key] == getattr(record, key)
            assert sample["gt_boxes"].dtype == torch.float32
            assert sample["gt_classes"].dtype == torch.int64
            assert sample["gt_boxes"].shape == (len(sample["gt_classes"]), 4)
            assert (sample["gt_boxes"] <= torch.tensor([width, height] * 2)).all()


def test_crowds_are_no_targets(dataset):
    samples = itertools.chain(*take(build_train_loader([dataset], **TRAIN), 20))
    classes = {sample["image_id"]: sample["gt_classes"].tolist() for sample in samples}
    assert classes == {1: [0, 1], 2: [0], 3: [0], 4: [0], 5: [0]}


def test_empty_images_are_trained_on_if_asked_for(dataset):
    loader = build_train_loader([dataset], **TRAIN | {"filter_empty": False})
    samples = {sample["image_id"]: sample for batch in take(loader, 20) for sample in batch}
    assert sorted(samples) == [1, 2, 3, 4, 5, 6, 7]
    for image_id in (6, 7):
        assert samples[image_id]["gt_boxes"].shape == (0, 4)


def test_boxes_follow_the_pixels(coco):
    """A white rectangle on black is where its box says, whatever was drawn."""
    images = [coco.image(1, 60, 40)]
    source = coco.write(images, [coco.box(1, 1, (12, 8, 24, 16))])
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[8:24, 12:36] = 255
    Image.fromarray(picture).save(source.image_root / "1.png")
    arguments = TRAIN | {"min_sizes": (20, 40, 80), "max_size": 200}
    seen = set()
    for batch in take(build_train_loader([load_dataset(source)], **arguments), 30):
        for sample in batch:
            white = (sample["image"][0] > 127).nonzero()
            top, left = white.min(dim=0).values.tolist()
            bottom, right = (white.max(dim=0).values + 1).tolist()
            expected = torch.tensor([[left, top, right, bottom]], dtype=torch.float32)
            torch.testing.assert_close(sample["gt_boxes"], expected, rtol=0, atol=0.51)
            seen.add((sample["image"].shape[1], left > 60 * 12 / 60))
    assert len(seen) >= 4


def test_grouping_separates_landscape_from_portrait(dataset):
    def shapes_per_batch(grouping):
        loader = build_train_loader([dataset], **TRAIN | {"aspect_ratio_grouping": grouping})
        return {
            len({sample["width"] > sample["height"] for sample in batch})
            for batch in take(loader, 30)
        }

    assert shapes_per_batch(True) == {1}
    assert shapes_per_batch(False) == {1, 2}


def test_batches_do_not_depend_on_workers_or_global_randomness(dataset):
    alone = take(build_train_loader([dataset], **TRAIN), 8)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    helped = take(build_train_loader([dataset], **TRAIN | {"num_workers": 2}), 8)
    assert_same_batches(alone, helped)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_starting_later_equals_skipping(dataset, num_workers):
    whole = take(build_train_loader([dataset], **TRAIN), 9)
    arguments = TRAIN | {"num_workers": num_workers}
    assert_same_batches(
        take(build_train_loader([dataset], **arguments, start_batch=6), 3), whole[6:]
    )


def test_seeds_differ(dataset):
    def first_ids(seed):
        batches = take(build_train_loader([dataset], **TRAIN | {"seed": seed}), 8)
        return [sample["image_id"] for batch in batches for sample in batch]

    assert len({tuple(first_ids(seed)) for seed in range(4)}) == 4


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_the_global_generators_alone(dataset, num_workers):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    take(build_train_loader([dataset], **TRAIN | {"num_workers": num_workers}), 2)
    list(build_test_loader(dataset, **TEST | {"num_workers": num_workers}))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002


def test_several_sets_are_trained_on_together(coco):
    datasets = []
    for name, numbers in (("one", (1, 2)), ("two", (3, 4, 5))):
        images = [coco.image(number) for number in numbers]
        source = coco.write(images, [coco.box(n, n) for n in numbers], name=name)
        coco.draw(source, images)
        datasets.append(load_dataset(source))
    batches = take(build_train_loader(datasets, **TRAIN | {"images_per_batch": 5}), 2)
    for batch in batches:
        assert sorted(sample["image_id"] for sample in batch) == [1, 2, 3, 4, 5]


def test_sets_of_different_classes_cannot_be_mixed(coco, dataset):
    other = load_dataset(coco.write([], name="other", categories=[{"id": 1, "name": "bird"}]))
    with pytest.raises(DatasetError, match="'set' and 'other' have different classes"):
        build_train_loader([dataset, other], **TRAIN)


@pytest.mark.parametrize(
    ("images", "boxes", "filter_empty", "said"),
    [
        ([], [], False, "no image$"),
        ([1], [], True, "no image with a box"),
        ([1], None, True, "no image with a box"),
        ([1], [{"iscrowd": 1}], True, "no image with a box that is not a crowd"),
    ],
)
def test_nothing_to_train_on(coco, images, boxes, filter_empty, said):
    entries = None if boxes is None else [coco.box(1, 1, **changes) for changes in boxes]
    empty = load_dataset(coco.write([coco.image(number) for number in images], entries))
    with pytest.raises(DatasetError, match=f"nothing to train on in 'set'.*{said}"):
        build_train_loader([empty], **TRAIN | {"filter_empty": filter_empty})


def test_filtering_is_logged(dataset, caplog):
    with caplog.at_level(logging.INFO):
        build_train_loader([dataset], **TRAIN)
    assert "5 of 7 images have boxes" in caplog.text


def test_seed_must_be_resolved_by_the_caller(dataset):
    with pytest.raises(ValueError, match="seed"):
        build_train_loader([dataset], **TRAIN | {"seed": -1})


# -- testing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_test_loader_gives_every_image_once_in_order(dataset, num_workers):
    loader = build_test_loader(dataset, **TEST | {"num_workers": num_workers})
    assert len(loader) == 4
    for _ in range(2):
        batches = list(loader)
        assert [[sample["image_id"] for sample in batch] for batch in batches] == [
            [1, 2],
            [3, 4],
            [5, 6],
            [7],
        ]
    for sample in itertools.chain(*batches):
        assert set(sample) == {"image", "height", "width", "image_id", "file_name"}
        image = resize_shortest_edge(read_image(sample["file_name"], "BGR"), 15, 60)
        assert min(image.shape[:2]) == 15
        assert np.array_equal(sample["image"].permute(1, 2, 0).numpy(), image)


def test_min_size_zero_keeps_the_size(dataset):
    for batch in build_test_loader(dataset, **TEST | {"min_sizes": (0,), "max_size": 8}):
        for sample in batch:
            assert sample["image"].shape == (3, sample["height"], sample["width"])


def test_a_set_without_annotations_can_be_run_on(coco):
    images = [coco.image(1)]
    source = coco.write(images, None)
    coco.draw(source, images)
    assert len(list(build_test_loader(load_dataset(source), **TEST))) == 1


def test_testing_takes_one_size(dataset):
    with pytest.raises(ValueError, match="testing takes one size"):
        build_test_loader(dataset, **{**TEST, "min_sizes": (10, 20)})


# -- errors on the way ----------------------------------------------------------------------------


def break_image(dataset, how):
    path = dataset.source.image_root / "3.png"
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:300])
    else:
        Image.new("RGB", (41, 30)).save(path)
    return path


SAID = {
    "missing": "there is no such image",
    "truncated": "cannot be read as an image",
    "size": r"the image is 41x30 pixels .* the json says 40x30 for image 3",
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("how", SAID)
def test_errors_reach_the_user_as_they_were(dataset, how, num_workers):
    path = break_image(dataset, how)
    workers = {"num_workers": num_workers}
    loaders = (
        build_train_loader([dataset], **TRAIN | workers),
        build_test_loader(dataset, **TEST | workers),
    )
    for loader in loaders:
        with pytest.raises(DatasetError, match=SAID[how]) as caught:
            take(loader, 20)
        assert str(caught.value).startswith(f"{path}: ")
        assert "Traceback" not in str(caught.value)


# -- real data ------------------------------------------------------------------------------------


@pytest.fixture
def blood_cells(bccd):
    entry = ("bccd", str(bccd / "annotations/instances_val.json"), str(bccd / "images"))
    return load_dataset(find_dataset("bccd", [entry]))


def test_real_images_for_training(blood_cells):
    arguments = TRAIN | {"min_sizes": (240, 320), "max_size": 1333, "images_per_batch": 4}
    batches = take(build_train_loader([blood_cells], **arguments), 3)
    for sample in itertools.chain(*batches):
        assert tuple(sample["image"].shape) in ((3, 240, 320), (3, 320, 427))
        assert len(sample["gt_boxes"]) > 0
        assert sample["gt_classes"].max() < 3
    helped = build_train_loader([blood_cells], **arguments | {"num_workers": 2}, start_batch=1)
    assert_same_batches(take(helped, 2), batches[1:])


@pytest.mark.detectron2
def test_real_images_equal_detectron2s(blood_cells):
    mapper = pytest.importorskip("detectron2.data.dataset_mapper")
    transforms = pytest.importorskip("detectron2.data.transforms")
    theirs = mapper.DatasetMapper(
        is_train=False,
        augmentations=[transforms.ResizeShortestEdge(320, 1333, "choice")],
        image_format="BGR",
    )
    loader = build_test_loader(blood_cells, **TEST | {"min_sizes": (320,), "max_size": 1333})
    for sample in itertools.chain(*take(loader, 5)):
        keys = ("file_name", "height", "width", "image_id")
        expected = theirs({key: sample[key] for key in keys})
        torch.testing.assert_close(sample["image"], expected["image"], rtol=0, atol=0)
