"""What a run says of its data before its first step."""

import json
import logging

import pytest
from PIL import Image

from cascade_det.config import load_config
from cascade_det.engine.datasets import images_to_optimise_with, load_datasets, scheduled
from cascade_det.errors import DatasetError


@pytest.fixture
def make_cfg(tmp_path):
    """A configuration on six images, two of them without a box; ``changes`` are of the json."""

    def make(*options, **changes):
        images = [{"id": n, "file_name": f"{n}.png", "width": 8, "height": 6} for n in range(1, 7)]
        for image in images:
            Image.new("RGB", (8, 6)).save(tmp_path / image["file_name"])
        boxes = [
            {"id": n, "image_id": n, "category_id": 1, "bbox": [1, 1, 4, 4]} for n in range(1, 5)
        ]
        content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "a"}]}
        (tmp_path / "a.json").write_text(json.dumps(content | changes))
        own = f"[('a', '{tmp_path / 'a.json'}', '{tmp_path}')]"
        keys = ["CASCADE.DATASETS", own, "DATASETS.TRAIN", "('a',)", "DATASETS.TEST", "('a',)"]
        return load_config(None, [*keys, "MODEL.ROI_HEADS.NUM_CLASSES", "1", *options])

    return make


def said(caplog, cfg):
    with caplog.at_level(logging.INFO):
        return scheduled(cfg, load_datasets(cfg, train=True)), caplog.text


def test_epochs_are_said(make_cfg, caplog):
    cfg = make_cfg("SOLVER.MAX_ITER", "90000", "SOLVER.IMS_PER_BATCH", "2")
    found, text = said(caplog, cfg)
    assert found is cfg
    assert "4 of 6 images have boxes to train on" in text
    assert "90,000 iterations x 2 images = 45,000 epochs of 4 images" in text


def test_images_without_boxes_count_where_they_are_trained_on(make_cfg, caplog):
    options = ["SOLVER.MAX_ITER", "10", "DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False"]
    _, text = said(caplog, make_cfg(*options))
    assert "10 iterations x 16 images = 26.7 epochs of 6 images" in text
    assert "images have boxes" not in text


def test_a_schedule_by_epochs_is_said_key_by_key(make_cfg, caplog):
    options = ["SOLVER.MAX_ITER", "100", "SOLVER.STEPS", "(50,)", "SOLVER.WARMUP_ITERS", "10"]
    options += ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.CHECKPOINT_PERIOD", "50"]
    cfg, text = said(caplog, make_cfg(*options, "CASCADE.EPOCHS", "10"))
    assert cfg.SOLVER.MAX_ITER == 20
    assert (
        "CASCADE.EPOCHS is 10: SOLVER.MAX_ITER 100 -> 20, SOLVER.STEPS (50,) -> (10,), "
        "SOLVER.WARMUP_ITERS 10 -> 2, SOLVER.CHECKPOINT_PERIOD 50 -> 10\n"
    ) in text
    assert "20 iterations x 2 images = 10 epochs of 4 images" in text


def test_nothing_to_train_on(make_cfg):
    cfg = make_cfg(annotations=[])
    with pytest.raises(DatasetError, match="none of 6 images has a box"):
        scheduled(cfg, load_datasets(cfg, train=True))


def test_no_mask_to_train_on(make_cfg):
    cfg = make_cfg("MODEL.MASK_ON", "True")
    with pytest.raises(DatasetError, match=r"a\.json: no object has a mask .* MODEL\.MASK_ON"):
        scheduled(cfg, load_datasets(cfg, train=True))


def test_exits_alone_need_no_masks(make_cfg):
    frozen = ["MODEL.CASCADE.TRAINING.FREEZE_DETECTOR", "True", "MODEL.CASCADE.EXIT.LEARNED"]
    cfg = make_cfg("MODEL.MASK_ON", "True", *frozen, "('gate',)")
    scheduled(cfg, load_datasets(cfg, train=True))


@pytest.mark.parametrize(("train", "times"), [(True, 1), (False, 0)])
def test_objects_without_a_mask_are_told_of_training_sets(make_cfg, caplog, train, times):
    with caplog.at_level(logging.WARNING):
        load_datasets(make_cfg("MODEL.MASK_ON", "True"), train=train)
    assert caplog.text.count("4 of 4 objects have no mask") == times


@pytest.mark.parametrize("train", [True, False])
def test_mistakes_are_told_at_the_start_of_training_and_evaluation(make_cfg, caplog, train):
    cfg = make_cfg(categories=[{"id": 1, "name": "a"}, {"id": 2, "name": "a"}])
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    with caplog.at_level(logging.WARNING):
        load_datasets(cfg, train=train)
    assert "2 x category that shares its name with another: category 1 ('a')" in caplog.text


@pytest.mark.parametrize("train", [True, False])
def test_the_key_says_which_links_are_followed(make_cfg, tmp_path_factory, tmp_path, train):
    cfg = make_cfg()
    far = tmp_path_factory.mktemp("far") / "x.png"
    (tmp_path / "1.png").rename(far)
    (tmp_path / "1.png").symlink_to(far)
    with pytest.raises(DatasetError, match=r"which CASCADE\.FOLLOW_LINKS 'near' does not follow"):
        load_datasets(cfg, train=train)
    cfg.CASCADE.FOLLOW_LINKS = "all"
    assert len(load_datasets(cfg, train=train)[0].records) == 6


@pytest.mark.parametrize(
    ("count", "ids"),
    [(1, [1]), (4, [1, 2, 4, 5]), (6, [1, 2, 3, 4, 5, 6]), (9, [1, 2, 3, 4, 5, 6])],
)
def test_images_to_optimise_with_are_spread_over_the_training_data(make_cfg, count, ids):
    cfg = make_cfg("MODEL.CASCADE.FAST.IMAGES", str(count))
    batches = images_to_optimise_with(cfg)
    assert [len(batch) for batch in batches] == [1] * len(ids)
    assert [batch[0]["image_id"] for batch in batches] == ids
    assert images_to_optimise_with(make_cfg()) is None
