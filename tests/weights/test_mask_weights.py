"""Weights of mask heads: which files are enough, and what is said of the others."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from cascade_det.config import load_config
from cascade_det.errors import CheckpointError
from cascade_det.standalone import build_detector
from cascade_det.weights import load_weights

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quick_schedules" / "instant_test.yaml"
MASKS = [
    *("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NUM_CONV", 2),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 4),
]
EVERY = [*MASKS, "MODEL.CASCADE.MASK.STAGES", "every"]
IN_LAST = 8  # tensors of two convolutions, the deconvolution and the predictor


def build(options):
    return build_detector(load_config(CONFIG, options))


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {"none": build([]), "last": build(MASKS), "every": build(EVERY)}


@pytest.fixture
def file_of(tmp_path):
    def save(state):
        torch.save({"model": state}, tmp_path / "weights.pth")
        return tmp_path / "weights.pth"

    return save


def refused(model, path):
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, path, complete=True)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


@pytest.mark.parametrize("stages", ["last", "every"])
def test_a_model_with_masks_needs_them(stages, models, file_of):
    message = refused(models[stages], file_of(models["none"].state_dict()))
    count = IN_LAST * (3 if stages == "every" else 1)
    assert f"lacks the mask head ({count} of {count} tensors)" in message
    assert message.endswith("or leave masks out (MODEL.MASK_ON False).")


@pytest.mark.parametrize("stages", ["last", "every"])
def test_a_model_without_masks_leaves_them_out(stages, models, file_of):
    report = load_weights(models["none"], file_of(models[stages].state_dict()), complete=True)
    assert report.missing == []
    assert len(report.unexpected) == IN_LAST * (3 if stages == "every" else 1)
    assert all(name.startswith("roi_heads.mask_head.") for name in report.unexpected)


@pytest.mark.parametrize(("in_file", "wanted"), [("last", "every"), ("every", "last")])
def test_the_other_arrangement_is_named(in_file, wanted, models, file_of):
    path = file_of(models[in_file].state_dict())
    assert f"or set MODEL.CASCADE.MASK.STAGES to '{in_file}'" in refused(models[wanted], path)


@pytest.mark.parametrize(
    "name", ["mask_head.predictor.bias", "mask_head.mask_fcn2.weight", "mask_head.deconv.weight"]
)
def test_a_single_tensor_is_missed(name, models, file_of):
    state = models["last"].state_dict()
    del state[f"roi_heads.{name}"]
    message = refused(models["last"], file_of(state))
    assert f"lacks the mask head (1 of {IN_LAST} tensors), such as roi_heads.{name}" in message


@pytest.mark.parametrize("stages", [[], ["MODEL.CASCADE.MASK.STAGES", "every"]])
def test_the_first_layers_of_a_deeper_head_are_another_one(stages, file_of):
    deeper = build([*MASKS, *stages, "MODEL.ROI_MASK_HEAD.NUM_CONV", 3]).state_dict()
    message = refused(build([*MASKS, *stages]), file_of(deeper))
    assert "mask_fcn3.weight" in message
    assert "which this model has no place for" in message


def test_the_first_of_more_stages(file_of):
    """A cascade of two stages takes the first two mask heads, too."""
    torch.manual_seed(1)
    fewer = ["MODEL.ROI_BOX_CASCADE_HEAD.IOUS", (0.5, 0.6)]
    fewer += ["MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS", ((10, 10, 5, 5), (20, 20, 10, 10))]
    whole, two = build(EVERY), build([*EVERY, *fewer])
    load_weights(two, file_of(whole.state_dict()), complete=True)
    for name, value in two.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
    message = refused(whole, file_of(two.state_dict()))
    assert "has 2 stages" in message


@pytest.mark.parametrize("stages", ["last", "every"])
def test_another_number_of_classes_resets_the_predictors_alone(stages, models, file_of):
    arrangement = MASKS if stages == "last" else EVERY
    other = build([*arrangement, "MODEL.ROI_HEADS.NUM_CLASSES", 2])
    before = {name: value.clone() for name, value in other.state_dict().items()}
    path = file_of(models[stages].state_dict())
    reset = load_weights(other, path).reinitialised
    predictors = ["mask_head.predictor"]
    if stages == "every":
        predictors = [f"mask_head.{stage}.predictor" for stage in range(3)]
    predictors += [f"box_predictor.{stage}.cls_score" for stage in range(3)]
    assert set(reset) == {f"roi_heads.{p}.{x}" for p in predictors for x in ("weight", "bias")}
    for name, value in other.state_dict().items():
        assert torch.equal(
            value, before[name] if name in reset else models[stages].state_dict()[name]
        )
    assert "another MODEL.ROI_HEADS.NUM_CLASSES" in refused(other, path)


def test_a_head_for_all_classes_is_not_reset(models, file_of):
    agnostic = [*MASKS, "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True]
    one, other = build(agnostic), build([*agnostic, "MODEL.ROI_HEADS.NUM_CLASSES", 2])
    assert one.state_dict()["roi_heads.mask_head.predictor.weight"].shape[0] == 1
    reset = load_weights(other, file_of(one.state_dict())).reinitialised
    assert not any("mask_head" in name for name in reset)


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        (["MASK_HEAD.CLS_AGNOSTIC_MASK"], "ROI_MASK_HEAD.CLS_AGNOSTIC_MASK"),
        (["BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"], "ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"),
        (
            ["MASK_HEAD.CLS_AGNOSTIC_MASK", "BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"],
            "ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG and MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK",
        ),
    ],
)
def test_the_agnostic_layers_are_named(options, keys, file_of):
    base = [*MASKS, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", False]
    other = [*base, *(x for o in options for x in (f"MODEL.ROI_{o}", True))]
    message = refused(build(base), file_of(build(other).state_dict()))
    assert f"trained with another MODEL.{keys}: " in message


def test_another_layout_of_the_mask_head_is_named(models, file_of):
    path = file_of(models["last"].state_dict())
    wider = build([*MASKS, "MODEL.ROI_MASK_HEAD.CONV_DIM", 32])
    assert "trained with another MODEL.ROI_MASK_HEAD: " in refused(wider, path)
    deeper = build([*MASKS, "MODEL.ROI_MASK_HEAD.NUM_CONV", 3])
    assert refused(deeper, path).endswith("or give the MODEL.ROI_MASK_HEAD of their training.")


def test_mask_head_of_a_caffe2_model(models, tmp_path):
    """Background comes first there and has a mask."""
    own = models["last"].roi_heads.mask_head
    generator = np.random.default_rng(0)
    blobs = {"conv1_w": generator.normal(size=(1, 1)).astype(np.float32)}
    for i in (1, 2):
        shape = tuple(getattr(own, f"mask_fcn{i}").weight.shape)
        blobs[f"_[mask]_fcn{i}_w"] = generator.normal(size=shape).astype(np.float32)
        blobs[f"_[mask]_fcn{i}_b"] = generator.normal(size=shape[:1]).astype(np.float32)
    blobs["conv5_mask_w"] = generator.normal(size=tuple(own.deconv.weight.shape))
    blobs["conv5_mask_b"] = generator.normal(size=tuple(own.deconv.bias.shape))
    masks, channels = own.predictor.weight.shape[:2]
    blobs["mask_fcn_logits_w"] = generator.normal(size=(masks + 1, channels, 1, 1))
    blobs["mask_fcn_logits_b"] = generator.normal(size=masks + 1)
    blobs = {name: np.float32(value) for name, value in blobs.items()}
    path = tmp_path / "caffe2.pkl"
    path.write_bytes(pickle.dumps({"blobs": blobs}, protocol=2))
    report = load_weights(models["last"], path)
    assert {n for n in report.loaded if "mask_head" in n} == {
        f"roi_heads.mask_head.{layer}.{kind}"
        for layer in ("mask_fcn1", "mask_fcn2", "deconv", "predictor")
        for kind in ("weight", "bias")
    }
    for found, blob in (
        (own.mask_fcn2.weight, blobs["_[mask]_fcn2_w"]),
        (own.deconv.bias, blobs["conv5_mask_b"]),
        (own.predictor.weight, blobs["mask_fcn_logits_w"][1:]),
        (own.predictor.bias, blobs["mask_fcn_logits_b"][1:]),
    ):
        assert torch.equal(found.detach(), torch.from_numpy(blob))
