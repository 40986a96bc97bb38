"""Masks and keypoints in a run: trained, timed, evaluated, and replayed where they diverge."""

import io
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks

from cascade_det.d2 import host
from cascade_det.d2.datasets import register_dataset
from cascade_det.d2.loader import build_test_loader
from cascade_det.d2.structures import check_masks_and_keypoints, to_inputs, to_sample
from cascade_det.errors import ConfigError

pytestmark = [pytest.mark.needs_detectron2, pytest.mark.usefixtures("no_pictures")]

POINTS = 3
SQUARE = [8.0, 8.0, 50.0, 8.0, 50.0, 40.0, 8.0, 40.0]
MODEL = [
    *("MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", "1", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8"),
    *("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", "7", "MODEL.KEYPOINT_ON", "True"),
    *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(8,)", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"),
    *(str(POINTS), "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION", "7"),
    *("TEST.KEYPOINT_OKS_SIGMAS", str([0.1] * POINTS), "SOLVER.MAX_ITER", "2"),
]
EVALUATED = [
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "CASCADE.VALIDATION_LOSS", "True"),
    *("CASCADE.BEST_METRIC", "validation/loss_mask"),
]


@pytest.fixture
def own(shapes, tmp_path):
    """Options of a data set with an octagon and three points in each box."""
    for split in ("train", "val"):
        shutil.copytree(shapes / split, tmp_path / split)
        content = json.loads((shapes / f"{split}.json").read_text())
        for annotation in content["annotations"]:
            x, y, w, h = annotation["bbox"]
            angles = np.arange(8) * np.pi / 4
            corners = np.stack([np.cos(angles) * w + w + 2 * x, np.sin(angles) * h + h + 2 * y]) / 2
            annotation["segmentation"] = [corners.T.reshape(-1).tolist()]
            annotation["keypoints"] = [x, y, 2, x + w / 2, y + h / 2, 1, 0, 0, 0]
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    names = [(f"own_{s}", str(tmp_path / f"{s}.json"), str(tmp_path / s)) for s in ("train", "val")]
    for name in names:
        register_dataset(name[0], names)
        MetadataCatalog.get(name[0]).set(keypoint_names=["a", "b", "c"], keypoint_flip_map=[])
    keys = ["CASCADE.DATASETS", str(names)]
    return [*keys, "DATASETS.TRAIN", "('own_train',)", "DATASETS.TEST", "('own_val',)"]


def test_masks_and_keypoints_are_trained_timed_and_evaluated(own, make_cfg, tmp_path):
    results = host.train(make_cfg(*own, *MODEL, *EVALUATED))
    output = tmp_path / "output"
    saved = json.loads((output / "results.json").read_text())
    assert saved.keys() >= {"bbox", "segm", "keypoints", "stages", "exits", "latency"}
    assert list(saved["segm"])[:4] == ["AP", "AP50", "AP75", "AP90"]
    assert saved["latency"]["parts"]["masks"]["median_ms"] > 0
    truth = COCO(str(tmp_path / "val.json"))
    found = truth.loadRes(str(output / "inference" / "coco_instances_results.json"))
    evaluation = COCOeval(truth, found, "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert results["segm"]["AP"] == pytest.approx(100 * evaluation.stats[0], abs=1e-9)
    assert {"loss_mask", "loss_keypoint", "loss_cls_stage2"} <= results["validation"].keys()
    best = torch.load(output / "model_best.pth", weights_only=True)
    assert best["metric"] == {"validation/loss_mask": results["validation"]["loss_mask"]}


@pytest.fixture
def some_without_masks(own, tmp_path):
    """Takes the masks of every third object of those data away."""
    for split in ("train", "val"):
        content = json.loads((tmp_path / f"{split}.json").read_text())
        for annotation in content["annotations"][::3]:
            annotation["segmentation"] = []
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    return [*own, "DATASETS.TRAIN", "('own_train',)", "MODEL.KEYPOINT_ON", "False"]


class TestObjectsWithoutMasks:
    MASKS = (*MODEL[:8], "SOLVER.MAX_ITER", "2", "MODEL.CASCADE.MASK.STAGES", "every")

    def test_dropped_they_do_not_train(self, some_without_masks, make_cfg, on_step, tmp_path):
        seen = []
        on_step(lambda _, batch: seen.extend(batch))
        options = [*self.MASKS, *EVALUATED[:4], "CASCADE.MASKLESS", "drop"]
        results = host.train(make_cfg(*some_without_masks, *options))
        content = json.loads((tmp_path / "train.json").read_text())
        for inputs in seen:
            of_image = [a for a in content["annotations"] if a["image_id"] == inputs["image_id"]]
            assert len(inputs["instances"]) == sum(bool(a["segmentation"]) for a in of_image)
        assert len(seen) == 4
        assert results["validation"]["loss_mask_stage2"] > 0
        # Their boxes count for the AP of boxes; that of masks is ours, which leaves them out.
        last = results["stages"]["stage2"]
        assert results["segm"]["AP"] == pytest.approx(last["segm"]["AP"], abs=1e-6)
        assert results["bbox"]["AP"] == pytest.approx(last["AP"], abs=1e-6)


@pytest.mark.parametrize("kind", ["polygon", "bitmask"])
def test_a_batch_with_masks_that_diverges_is_replayed(own, make_cfg, tmp_path, kind, on_step):
    cfg = make_cfg(*own, *MODEL, "DATASETS.TEST", "()", "INPUT.MASK_FORMAT", kind)
    model = build_model(cfg).state_dict()
    model["roi_heads.mask_head.deconv.weight"].fill_(3e38)
    torch.save({"model": model}, tmp_path / "broken.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "broken.pth")
    seen = []
    on_step(lambda _, batch: seen.extend(batch))
    with pytest.raises(FloatingPointError, match=r"iteration 0, in the detector, loss_mask is nan"):
        host.train(cfg)
    (file,) = (tmp_path / "output").glob("diverged_*.pth")
    report = host.replay_batch(cfg, file)
    assert "loss_mask nan" in report
    assert any(
        line.startswith("outputs that are not finite: roi_heads.mask_head") for line in report
    )
    written = torch.load(file, weights_only=True)["batch"]
    for inputs, sample in zip(seen, written, strict=True):
        assert_same_inputs(to_inputs(sample), inputs)


def assert_same_inputs(one, other):
    """Of the instances all, of the rest what is plain."""
    assert torch.equal(one["image"], other["image"])
    assert one["file_name"] == other["file_name"]
    ours, theirs = one["instances"], other["instances"]
    assert ours.image_size == theirs.image_size
    assert ours.get_fields().keys() == theirs.get_fields().keys()
    for name, value in theirs.get_fields().items():
        found = ours.get(name)
        assert type(found) is type(value), name
        if isinstance(value, PolygonMasks):
            assert len(found) == len(value)
            for polygons, wanted in zip(found.polygons, value.polygons, strict=True):
                for polygon, points in zip(polygons, wanted, strict=True):
                    assert isinstance(polygon, np.ndarray)
                    assert polygon.dtype == points.dtype
                    np.testing.assert_array_equal(polygon, points)
        else:
            tensors = [x if isinstance(x, torch.Tensor) else x.tensor for x in (found, value)]
            assert tensors[0].dtype == tensors[1].dtype
            assert torch.equal(*tensors)


@st.composite
def inputs(draw):
    """What a training model of Detectron2 is given of an image, with any fields and any number."""
    height, width, count = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    fields = {
        "gt_boxes": Boxes(torch.rand(count, 4, generator=generator) * 9),
        "gt_classes": torch.randint(0, 5, (count,), generator=generator),
    }
    if (masks := draw(st.sampled_from(["none", "polygon", "bitmask"]))) == "polygon":
        parts = st.lists(st.integers(3, 5), min_size=1, max_size=2)
        fields["gt_masks"] = PolygonMasks(
            [
                [torch.rand(2 * n, generator=generator, dtype=torch.float64).numpy() for n in sizes]
                for sizes in (draw(parts) for _ in range(count))
            ]
        )
    elif masks == "bitmask":
        fields["gt_masks"] = BitMasks(torch.rand(count, height, width, generator=generator) > 0.5)
    if draw(st.booleans()):
        fields["gt_keypoints"] = Keypoints(torch.rand(count, POINTS, 3, generator=generator))
    if draw(st.booleans()):
        fields["gt_weights"] = torch.rand(count, generator=generator)
    return {
        "file_name": draw(st.text(max_size=5)),
        "image_id": draw(st.one_of(st.integers(0, 2**40), st.text(max_size=5))),
        "image": torch.randint(0, 255, (3, height, width), generator=generator, dtype=torch.uint8),
        "height": 2 * height,
        "width": 2 * width,
        "instances": Instances((height, width), **fields),
    }


@given(inputs())
@settings(max_examples=60)
def test_inputs_survive_a_file_of_plain_types(given_inputs):
    file = io.BytesIO()
    torch.save(to_sample(given_inputs), file)
    file.seek(0)
    back = to_inputs(torch.load(file, weights_only=True))
    assert back.keys() == given_inputs.keys()
    for name in ("height", "width", "image_id"):
        assert back[name] == given_inputs[name]
    assert_same_inputs(back, given_inputs)


def change_masks(folder, changes):
    """Give objects of the training and test set other masks, by their place; ``None`` for none."""
    for split in ("train", "val"):
        path = folder / f"{split}.json"
        content = json.loads(path.read_text())
        for place, mask in changes.items():
            content["annotations"][place]["segmentation"] = mask
            if mask is None:
                del content["annotations"][place]["segmentation"]
        path.write_text(json.dumps(content))


@pytest.mark.parametrize("kind", ["polygon", "bitmask"])
def test_objects_without_a_mask_are_left_out_and_evaluated(own, make_cfg, tmp_path, kind, caplog):
    """Detectron2 alone ends in a KeyError at the first two, and drops the third."""
    change_masks(tmp_path, {0: None, 1: [], 2: [[1.0, 2.0]], 3: [[1.0, 2.0], SQUARE]})
    cfg = make_cfg(*own, *MODEL, *EVALUATED, "INPUT.MASK_FORMAT", kind)
    for name in ("own_train", "own_val"):
        mapped = list(build_test_loader(cfg, name, DatasetMapper(cfg, is_train=True)))
        found = sum(len(inputs["instances"]) for batch in mapped for inputs in batch)
        path = tmp_path / f"{name[4:]}.json"
        assert found == len(json.loads(path.read_text())["annotations"]) - 3
    with caplog.at_level(logging.WARNING):
        results = host.train(cfg)
    assert results["segm"]["AP"] >= 0
    assert caplog.text.count("objects have no mask: they are left out of training") == 1


def test_rle_needs_bitmasks(own, make_cfg, tmp_path):
    content = json.loads((tmp_path / "train.json").read_text())
    image_id = content["annotations"][0]["image_id"]
    (image,) = (image for image in content["images"] if image["id"] == image_id)
    size = [image["height"], image["width"]]
    change_masks(tmp_path, {0: {"size": size, "counts": [9, size[0] * size[1] - 9]}})
    message = r"train\.json has 1 objects whose mask is RLE.* Set it to bitmask"
    with pytest.raises(ConfigError, match=message):
        host.train(make_cfg(*own, *MODEL))
    host.train(make_cfg(*own, *MODEL, "INPUT.MASK_FORMAT", "bitmask", "DATASETS.TEST", "()"))


def test_a_sample_of_the_standalone_host_may_mix_polygons_and_bitmaps():
    square = torch.tensor([2.0, 2.0, 8.0, 2.0, 8.0, 6.0, 2.0, 6.0], dtype=torch.float64)
    bitmap = torch.zeros(10, 12, dtype=torch.bool)
    bitmap[2:6, 2:8] = True
    image = torch.zeros(3, 10, 12, dtype=torch.uint8)
    sample = {"image": image, "gt_boxes": torch.rand(2, 4), "gt_masks": [[square], bitmap]}
    check_masks_and_keypoints(sample)
    masks = to_inputs(sample)["instances"].gt_masks
    assert isinstance(masks, BitMasks)
    assert torch.equal(masks.tensor, torch.stack([bitmap, bitmap]))
    for wrong in (None, bitmap[:9], bitmap.float()):
        with pytest.raises(ValueError, match="not one for each box"):
            check_masks_and_keypoints({**sample, "gt_masks": [[square], wrong]})
