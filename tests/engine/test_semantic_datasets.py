"""What a run says of its data for semantic segmentation before its first step."""

import pytest
from semantic_sets import CLASSES, labels_of, save, write_pair

from cascade_det import config
from cascade_det.data.semantic import build_semantic_test_loader, build_semantic_train_loader
from cascade_det.engine.datasets import scheduled_for
from cascade_det.engine.semantic_datasets import (
    load_semantic_datasets,
    load_semantic_training_data,
)
from cascade_det.errors import ConfigError, DatasetError


@pytest.fixture
def make_cfg(tmp_path):
    """A configuration of a training and a test set with two pairs each."""
    for split in ("train", "val"):
        for stem in "ab":
            write_pair(tmp_path / split, stem)
    own = [
        (name, "folders", f"{tmp_path}/{name}/images", f"{tmp_path}/{name}/labels")
        for name in ("train", "val")
    ]

    def make(*options):
        keys = ["CASCADE.SEMANTIC_DATASETS", str(own), "CASCADE.SEMANTIC_CLASSES", str(CLASSES)]
        keys += ["DATASETS.TRAIN", "('train',)", "DATASETS.TEST", "('val',)", "SEED", "1"]
        keys += ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3", "DATALOADER.NUM_WORKERS", "0"]
        return config.load_config(None, [*keys, *options])

    return make


def test_loaders_follow_from_a_configuration(make_cfg):
    cfg = make_cfg("SOLVER.IMS_PER_BATCH", "2", "INPUT.MIN_SIZE_TRAIN", "(12,)")
    (train,), (test,) = load_semantic_training_data(cfg)
    loader = build_semantic_train_loader(
        [train],
        **config.semantic_input_arguments(cfg, train=True),
        **config.semantic_train_loader_arguments(cfg),
    )
    batch = next(iter(loader))
    assert [tuple(sample["sem_seg"].shape) for sample in batch] == [(12, 16)] * 2
    loader = build_semantic_test_loader(
        test,
        **config.semantic_input_arguments(cfg, train=False),
        **config.test_loader_arguments(cfg),
    )
    assert [sample["image_id"] for batch in loader for sample in batch] == [0, 1]
    assert scheduled_for(make_cfg("CASCADE.EPOCHS", "32"), 2).SOLVER.MAX_ITER == 4


def test_what_a_configuration_can_have_wrong(make_cfg):
    with pytest.raises(ConfigError, match=r"DATASETS\.TRAIN is empty"):
        load_semantic_datasets(make_cfg("DATASETS.TRAIN", "()"), train=True)
    cfg = make_cfg("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "4")
    with pytest.raises(ConfigError, match=r"is 4, but data set 'train' has 3 classes \(ground, tr"):
        load_semantic_datasets(cfg, train=True)
    cfg = make_cfg("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "300")
    with pytest.raises(DatasetError, match="IGNORE_VALUE is 300"):
        load_semantic_datasets(cfg, train=True)


def test_only_test_images_are_decoded_before_a_run(make_cfg, tmp_path):
    for split in ("train", "val"):
        write_pair(tmp_path / split, "c", 64, 64)
        path = tmp_path / split / "images" / "c.png"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    assert len(load_semantic_datasets(make_cfg(), train=True)[0].records) == 3
    with pytest.raises(DatasetError, match=r"val/images/c\.png"):
        load_semantic_datasets(make_cfg(), train=False)
    cfg = make_cfg("CASCADE.ON_BAD_DATA", "skip")
    assert len(load_semantic_datasets(cfg, train=False)[0].records) == 2


def test_an_ignored_value_of_ones_own(make_cfg, tmp_path):
    labels = labels_of(6, 8)
    labels[0] = 9
    save(tmp_path / "train" / "labels" / "a.png", labels)
    with pytest.raises(DatasetError, match=r"a\.png: 9 \(classes are 0 to 2\)"):
        load_semantic_datasets(make_cfg(), train=True)
    cfg = make_cfg("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "9")
    (dataset,) = load_semantic_datasets(cfg, train=True)
    assert dataset.ignore_value == 9
    assert sum(dataset.class_pixels) == 2 * 6 * 8 - 8
