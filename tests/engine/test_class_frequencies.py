"""Where the frequencies of classes come from."""

from cascade_det import config
from cascade_det.data.catalog import find_dataset
from cascade_det.data.coco import load_dataset
from cascade_det.engine.class_frequencies import class_frequencies, lvis_evaluators


def cfg_of(source):
    cfg = config.get_cfg()
    cfg.CASCADE.DATASETS = [["set", str(source.json_file), str(source.image_root)]]
    cfg.DATASETS.TRAIN = ("set",)
    return cfg


def test_training_images_with_the_class_are_counted(coco):
    images = [coco.image(number) for number in range(1, 13)]
    boxes = [coco.box(number, number) for number in range(1, 13)]  # of class 3, on 12 images
    boxes += [coco.box(20 + n, 1, category_id=7) for n in range(15)]  # 15, all on one image
    source = coco.write(images, boxes)
    truth = load_dataset(source, keep_ground_truth=True).ground_truth
    assert class_frequencies(cfg_of(source), truth, find_dataset) == {3: "c", 7: "r"}


def test_the_json_says_it_itself(coco):
    categories = (
        {"id": 3, "name": "cat", "frequency": "f"},
        {"id": 7, "name": "dog", "frequency": "c"},
    )
    image = coco.image(1, neg_category_ids=[7], not_exhaustive_category_ids=[])
    source = coco.write([image], [coco.box(1, 1)], categories=categories)
    dataset = load_dataset(source, keep_ground_truth=True)
    assert dataset.ground_truth["images"][0]["neg_category_ids"] == [7]
    cfg = config.get_cfg()  # needs no training data
    assert class_frequencies(cfg, dataset.ground_truth, find_dataset) == {3: "f", 7: "c"}
    assert lvis_evaluators(cfg, dataset) == []
    cfg.CASCADE.LVIS_AP = True
    assert len(lvis_evaluators(cfg, dataset)) == 1
