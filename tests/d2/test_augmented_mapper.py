"""``CASCADE.AUGMENT`` in Detectron2: the samples of the standalone host, in its loader."""

import itertools
import math

import numpy as np
import pytest
import torch
from shape_runs import metrics_of

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.data import get_detection_dataset_dicts

from cascade_det import config
from cascade_det.d2 import host
from cascade_det.d2.datasets import register_dataset
from cascade_det.d2.loader import build_train_loader
from cascade_det.d2.mapper import AugmentingMapper
from cascade_det.data.coco import load_dataset
from cascade_det.data.loader import detection_sample
from cascade_det.errors import ConfigError

pytestmark = [pytest.mark.needs_detectron2, pytest.mark.usefixtures("no_pictures")]

MASKS = (
    *("MODEL.MASK_ON", "True", "INPUT.MASK_FORMAT", "bitmask"),
    *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", "MODEL.ROI_MASK_HEAD.NUM_CONV", "1"),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", "8", "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", "7"),
)
ENTRIES = [
    ["Mosaic", {"size": [96, 128]}],
    ["ColorJitter", {"hue": 0.2}],
    ["RandomAffine", {"degrees": 20, "p": 0.5}],
    ["CopyPaste", {"p": 0.5}],
]


@pytest.mark.parametrize("masks", [MASKS, (*MASKS, "INPUT.MASK_FORMAT", "polygon"), ()])
def test_samples_are_those_of_the_standalone_host(make_cfg, masks):
    entries = ENTRIES if masks else ENTRIES[:3]
    cfg = make_cfg(*masks, "CASCADE.AUGMENT", entries, "INPUT.CROP.ENABLED", "True")
    source = register_dataset(cfg.DATASETS.TRAIN[0], cfg.CASCADE.DATASETS)
    theirs = get_detection_dataset_dicts(cfg.DATASETS.TRAIN)
    mapper = AugmentingMapper(cfg, theirs)
    records = load_dataset(source, masks="drop" if masks else None).records
    arguments = config.input_arguments(cfg, train=True)
    if masks:
        arguments["masks"]["maskless"] = "drop"
    make = detection_sample(records, **arguments)
    for seed, (record, entry) in enumerate(zip(records, theirs, strict=True)):
        np.random.seed(seed)  # noqa: NPY002
        inputs = mapper(entry)
        np.random.seed(seed)  # noqa: NPY002
        words = np.random.randint(0, 2**32, 4, np.uint32)  # noqa: NPY002
        sample = make(record, np.random.default_rng(words))
        assert torch.equal(inputs["image"], sample["image"])
        assert "annotations" not in inputs
        instances = inputs["instances"]
        assert instances.image_size == sample["image"].shape[1:]
        assert torch.equal(instances.gt_boxes.tensor, sample["gt_boxes"])
        assert torch.equal(instances.gt_classes, sample["gt_classes"])
        assert instances.has("gt_masks") == bool(masks)
        if masks:
            assert len(instances.gt_masks) == len(sample["gt_masks"])


@pytest.mark.parametrize("num_workers", ["0", "1"])
def test_its_loader_repeats_itself(make_cfg, num_workers):
    cfg = make_cfg(*MASKS, "CASCADE.AUGMENT", ENTRIES, "DATALOADER.NUM_WORKERS", num_workers)
    cfg.SEED = 5
    register_dataset(cfg.DATASETS.TRAIN[0], cfg.CASCADE.DATASETS)

    def images():
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        batches = itertools.islice(build_train_loader(cfg), 4)
        return [inputs["image"] for batch in batches for inputs in batch]

    first, second = images(), images()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({image.float().mean().item() for image in first}) == len(first)


def test_models_are_trained_on_them(make_cfg, tmp_path):
    options = ("SOLVER.MAX_ITER", "2", "DATASETS.TEST", "()", "CASCADE.AUGMENT", ENTRIES)
    host.train(make_cfg(*MASKS, *options))
    losses = [line["loss_mask"] for line in metrics_of(tmp_path / "output") if "loss_mask" in line]
    assert losses
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("MODEL.KEYPOINT_ON", "True"), r"KEYPOINT_ON is True.*boxes and masks only.*Set CASCADE"),
        (("MODEL.LOAD_PROPOSALS", "True"), "LOAD_PROPOSALS is True"),
        (("MODEL.META_ARCHITECTURE", "PanopticFPN"), "META_ARCHITECTURE is 'PanopticFPN'"),
        (("CASCADE.AUGMENT", [["CopyPaste"]]), r"CopyPaste.*MODEL\.MASK_ON is False"),
        (("CASCADE.AUGMENT", [["JPEG", {"q": 1}]]), "JPEG has no argument 'q'"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else "",
)
def test_what_it_cannot_augment_is_refused(make_cfg, options, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        make_cfg("CASCADE.AUGMENT", [["JPEG"]], *options)
