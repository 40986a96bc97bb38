"""Loaders end to end, on images made here and on real ones."""

import itertools
import logging
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from cascade_det.data.catalog import find_dataset
from cascade_det.data.coco import load_dataset
from cascade_det.data.loader import build_test_loader, build_train_loader
from cascade_det.data.transforms import read_image, resize_shortest_edge
from cascade_det.errors import ConfigError, DatasetError

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
    return load_dataset(coco.write(images, boxes))


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


def test_training_samples_have_their_documented_form(dataset):
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
    """A white rectangle on black stays inside its box under any augmentation."""
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


def test_rare_classes_are_seen_more_often(dataset):
    """Image 1 alone of five has class 1: at a threshold of 0.8 it comes twice per epoch."""
    arguments = TRAIN | {"repeat": {"threshold": 0.8, "square_root": True}}
    arguments["aspect_ratio_grouping"] = False
    alone = take(build_train_loader([dataset], **arguments), 9)
    ids = [sample["image_id"] for batch in alone for sample in batch]
    for epoch in range(3):
        assert sorted(ids[6 * epoch : 6 * epoch + 6]) == [1, 1, 2, 3, 4, 5]
    helped = build_train_loader([dataset], **arguments | {"num_workers": 2}, start_batch=4)
    assert_same_batches(take(helped, 5), alone[4:])


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
        boxes = [coco.box(number, number) for number in numbers]
        datasets.append(load_dataset(coco.write(images, boxes, name=name)))
    batches = take(build_train_loader(datasets, **TRAIN | {"images_per_batch": 5}), 2)
    for batch in batches:
        assert sorted(sample["image_id"] for sample in batch) == [1, 2, 3, 4, 5]


def test_sets_of_different_classes_cannot_be_mixed(coco, dataset):
    other = load_dataset(coco.write([], name="other", categories=[{"id": 1, "name": "bird"}]))
    with pytest.raises(DatasetError, match="'set' and 'other' have different classes"):
        build_train_loader([dataset, other], **TRAIN)


@pytest.mark.parametrize("filter_empty", [True, False])
@pytest.mark.parametrize(
    ("images", "boxes"), [([], []), ([1], []), ([1], None), ([1], [{"iscrowd": 1}])]
)
def test_nothing_to_train_on(coco, images, boxes, filter_empty):
    entries = None if boxes is None else [coco.box(1, 1, **changes) for changes in boxes]
    empty = load_dataset(coco.write([coco.image(number) for number in images], entries))
    said = f"nothing to train on in 'set': none of {len(images)} images has a box"
    with pytest.raises(DatasetError, match=said):
        build_train_loader([empty], **TRAIN | {"filter_empty": filter_empty})


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
    dataset = load_dataset(coco.write([coco.image(1)], None))
    assert dataset.records[0].boxes.shape == (0, 4)
    assert len(list(build_test_loader(dataset, **TEST))) == 1


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


def broken(dataset, *image_ids):
    for image_id in image_ids:
        path = dataset.source.image_root / f"{image_id}.png"
        path.write_bytes(path.read_bytes()[:300])


SKIP = {"on_bad_data": "skip"}


@pytest.mark.parametrize("grouping", [True, False])
def test_broken_images_are_replaced_and_nothing_else_changes(dataset, caplog, grouping):
    arguments = TRAIN | SKIP | {"aspect_ratio_grouping": grouping}
    whole = take(build_train_loader([dataset], **arguments), 30)
    broken(dataset, 2, 3)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        replaced = take(build_train_loader([dataset], **arguments), 30)
    stand_ins = set()
    for before, after in zip(itertools.chain(*whole), itertools.chain(*replaced), strict=True):
        if before["image_id"] not in (2, 3):
            assert_same_batches([[before]], [[after]])
            continue
        stand_ins.add((before["image_id"], after["image_id"]))
        if grouping:
            assert (after["width"] > after["height"]) == (before["width"] > before["height"])
    by_group = {(2, 4), (3, 1), (3, 5)}
    everything = {(broken, other) for broken in (2, 3) for other in (1, 4, 5)}
    assert stand_ins == (by_group if grouping else everything)
    for number in (2, 3):  # each once, however often it was met
        assert caplog.text.count(f"{number}.png: cannot be read as an image") == 1
    assert "broken images so far: 2" in caplog.text


def test_replacements_do_not_depend_on_workers_resuming_or_processes(dataset, caplog):
    broken(dataset, 2, 3)
    arguments = TRAIN | SKIP | {"images_per_batch": 4, "aspect_ratio_grouping": False}
    alone = take(build_train_loader([dataset], **arguments), 9)
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        helped = take(build_train_loader([dataset], **arguments | {"num_workers": 2}), 9)
    assert "Training on another image instead" in caplog.text
    assert_same_batches(helped, alone)
    assert_same_batches(
        take(build_train_loader([dataset], **arguments, start_batch=5), 4), alone[5:]
    )
    parts = [
        take(build_train_loader([dataset], **arguments, share=(rank, 2)), 9) for rank in (0, 1)
    ]
    assert_same_batches([one + other for one, other in zip(*parts, strict=True)], alone)


def test_when_no_image_can_be_read_it_ends(dataset):
    broken(dataset, *range(1, 8))
    with pytest.raises(DatasetError, match="no image could be read in place of a broken one"):
        take(build_train_loader([dataset], **TRAIN | SKIP), 1)


# -- several processes ----------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_processes_take_their_parts_of_every_batch(dataset, processes):
    arguments = TRAIN | {"images_per_batch": 6}
    whole = take(build_train_loader([dataset], **arguments), 5)
    parts = [
        take(build_train_loader([dataset], **arguments, share=(rank, processes)), 5)
        for rank in range(processes)
    ]
    together = [list(itertools.chain(*batches)) for batches in zip(*parts, strict=True)]
    assert_same_batches(together, whole)
    assert {len(batch) for part in parts for batch in part} == {6 // processes}


def test_processes_that_cannot_share_a_batch(dataset):
    with pytest.raises(ConfigError, match=r"SOLVER.IMS_PER_BATCH is 2, .* a multiple of 4"):
        build_train_loader([dataset], **TRAIN, share=(0, 4))


@pytest.mark.parametrize("processes", [1, 2, 3, 7, 9])
def test_processes_test_every_image_once(dataset, processes):
    whole = [
        list(build_test_loader(dataset, **TEST, share=(r, processes))) for r in range(processes)
    ]
    samples = [sample["image_id"] for batches in whole for batch in batches for sample in batch]
    assert samples == list(range(1, 8))
    sizes = [sum(map(len, batches)) for batches in whole]
    assert max(sizes) - min(sizes) <= 1


# -- losses on a test set -------------------------------------------------------------------------


def test_annotated_test_samples_are_the_same_with_boxes(dataset):
    """Boxes are those of the records, without crowds, scaled with the image."""
    plain = list(itertools.chain(*build_test_loader(dataset, **TEST)))
    annotated = list(itertools.chain(*build_test_loader(dataset, **TEST, annotated=True)))
    assert len(annotated) == 7
    for record, one, other in zip(dataset.records, plain, annotated, strict=True):
        boxes, classes = other.pop("gt_boxes"), other.pop("gt_classes")
        assert_same_batches([[one]], [[other]])
        height, width = one["image"].shape[1:]
        scale = np.array([width / record.width, height / record.height] * 2)
        wanted = record.boxes[~record.iscrowd] * scale
        torch.testing.assert_close(boxes, torch.tensor(wanted, dtype=torch.float32))
        assert classes.tolist() == record.classes[~record.iscrowd].tolist()


# -- interruption ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["train", "test"])
def test_workers_leave_ctrl_c_to_the_main_process(dataset, kind):
    """A terminal sends the signal to the workers too; loading continues."""
    arguments = {"num_workers": 2, "images_per_batch": 1}
    loader = (
        build_train_loader([dataset], **TRAIN | arguments)
        if kind == "train"
        else build_test_loader(dataset, **TEST | arguments)
    )
    batches = iter(loader)
    seen = [next(batches), next(batches)]  # one from each, so that both are up
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
    seen += itertools.islice(batches, 5)
    assert len(seen) == 7
    assert all(worker.is_alive() for worker in workers) or kind == "test"


# -- real data ------------------------------------------------------------------------------------


@pytest.fixture
def blood_cells(bccd):
    entry = ("bccd", str(bccd / "annotations/instances_val.json"), str(bccd / "images"))
    return load_dataset(find_dataset("bccd", [entry]))


@pytest.mark.needs_detectron2
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
