"""A segmenter with two scales: MERIT's numbers and names, its laws, and what is refused."""

import copy
import sys

import parity
import pytest
import torch
from small_segmenter import SEGMENTER, labelled
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from cascade_det.config import get_cfg
from cascade_det.errors import ConfigError
from cascade_det.segmentation.dual_scale import MODES
from cascade_det.standalone.build_segmenter import build_segmenter
from cascade_det.weights import load_weights

NODE = "MODEL.DUAL_SCALE"
MOBILE = ("MODEL.BACKBONE.NAME", "build_mobilenet_v2_backbone")
MAXVIT = ("MODEL.BACKBONE.NAME", "build_maxvit_backbone")
EVERY = pytest.mark.parametrize("mode", MODES)


def build(mode, *options):
    cfg = get_cfg()
    sizes = ("MODEL.PIXEL_STD", [50.0] * 3, f"{NODE}.MODE", mode, f"{NODE}.SIZES", [64, 56])
    cfg.merge_from_list([*SEGMENTER, *MOBILE, *sizes, *options])
    torch.manual_seed(0)
    return build_segmenter(cfg).eval()


def normalised(sample, segmenter):
    return (sample["image"][None] - segmenter.pixel_mean) / segmenter.pixel_std


def resized(x, *size):
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


@EVERY
@pytest.mark.parametrize("size", [(64, 64), (40, 90)])
def test_numbers_are_the_networks(mode, size):
    segmenter = build(mode)
    sample = {**labelled(*size), "height": 100, "width": 33}
    with torch.no_grad():
        logits = segmenter.network(resized(normalised(sample, segmenter), 64, 64))
    (found,) = segmenter.segment([sample]).sem_seg
    assert_close(found, resized(sum(logits), 100, 33)[0])
    after = segmenter.segment([sample], levels=True).levels
    assert [x.shape for (x,) in after] == [(100, 33)] * 4
    assert_close(after[1][0], resized(sum(logits[:2]), 100, 33)[0].argmax(0))
    loss = segmenter.loss([resized(x, *size) for x in logits], sample["sem_seg"][None])
    assert_close(segmenter.losses([sample])["loss_sem_seg"], loss)


@EVERY
def test_a_batch_is_its_images_one_by_one(mode):
    segmenter = build(mode)
    batch = [labelled(64, 75), labelled(31, 40), labelled(64, 64)]
    together = segmenter.segment(batch).sem_seg
    alone = [segmenter.segment([one]).sem_seg[0] for one in batch]
    assert [x.shape for x in together] == [(3, *one["sem_seg"].shape) for one in batch]
    assert_close(together, alone, rtol=0, atol=1e-4)
    assert segmenter.segment([]).sem_seg == []


def test_padding_to_the_largest_image_changes_no_loss():
    segmenter = build("cascaded")
    one = labelled(40, 96)
    other = {**labelled(70, 50), "sem_seg": torch.full((70, 50), 255)}
    alone = segmenter.losses([one])["loss_sem_seg"]
    assert_close(segmenter.losses([one, other])["loss_sem_seg"], alone)


@pytest.mark.parametrize(("mode", "grey"), [("parallel", False), ("cascaded", True)])
def test_all_that_is_not_frozen_learns(mode, grey):
    """Several processes would wait for a gradient of the stem for grey images."""
    segmenter = build(mode, f"{NODE}.GREY", grey).train()
    segmenter.losses([labelled(75, 90), labelled(64, 101)])["loss_sem_seg"].backward()
    unused = [name for name, p in segmenter.named_parameters() if p.grad is None]
    assert unused == [name for name, p in segmenter.named_parameters() if not p.requires_grad]
    assert {name.split(".")[0] for name in unused} == (set() if grey else {"conv"})


def test_grey_images_pass_their_stem():
    segmenter = build("parallel", f"{NODE}.GREY", True)
    sample = labelled(64, 64)
    with torch.no_grad():
        logits = segmenter.network(normalised(sample, segmenter)[:, :1])
    assert_close(segmenter.segment([sample]).sem_seg[0], sum(logits)[0])


@EVERY
def test_names_are_the_official_ones(mode):
    official = parity.state(parity.vectors(f"merit_{mode}"))
    found = build(mode).state_dict()

    def is_decoded(name):
        return not name.startswith("backbone")

    assert set(filter(is_decoded, found)) == set(filter(is_decoded, official))
    assert {name.split(".")[0] for name in found} == {name.split(".")[0] for name in official}


def test_a_copy_is_a_segmenter_of_its_own():
    segmenter, sample = build("cascaded"), labelled(64, 64)
    expected = segmenter.segment([sample]).sem_seg[0]
    other = copy.deepcopy(segmenter)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    assert not other.segment([sample]).sem_seg[0].any()
    assert_close(segmenter.segment([sample]).sem_seg[0], expected)


def test_the_file_of_an_encoder_fills_both(tmp_path):
    segmenter, other = build("cascaded"), build("cascaded")
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    torch.save(other.backbone1.state_dict(), tmp_path / "encoder.pth")
    report = load_weights(segmenter, tmp_path / "encoder.pth")
    for encoder in (segmenter.backbone1, segmenter.backbone2):
        assert_close(encoder.state_dict(), other.backbone1.state_dict(), rtol=0, atol=0)
    assert report.unexpected == report.ambiguous == []
    assert len(report.loaded) + len(report.missing) == report.total
    assert not any(name.startswith("backbone") for name in report.missing)
    assert "decoder (" in str(report)


def test_the_file_of_one_encoder_where_the_other_has_further_layers(tmp_path):
    """The last norm of the file is not that of a layer which the file lacks."""
    model = nn.Module()
    model.backbone1 = nn.ModuleDict({"conv": nn.ModuleDict({"norm": nn.LayerNorm(2)})})
    model.backbone1["norm"], model.backbone2 = nn.LayerNorm(2), nn.ModuleDict()
    model.backbone2["norm"] = nn.LayerNorm(2)
    torch.save({"norm.weight": torch.zeros(2)}, tmp_path / "encoder.pth")
    report = load_weights(model, tmp_path / "encoder.pth")
    assert report.loaded == ["backbone1.norm.weight", "backbone2.norm.weight"]
    assert "backbone1.conv.norm.weight" in report.missing


def test_timm_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"maxxvit_rmlp_small_rw_256 is built from timm.*\[timm"):
        build("parallel", *MAXVIT, f"{NODE}.SIZES", [64, 32])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((f"{NODE}.MODE", "both"), "Supported: 'off', 'parallel', 'cascaded'"),
        ((f"{NODE}.SIZES", [56, 64]), "the larger first"),
        (("MODEL.CASCADE_DECODER.EXIT.ENABLED", True), "two scales have no exits"),
        ((f"{NODE}.SIZES", [64]), "Give 2 whole numbers"),
        ((f"{NODE}.SIZES", [64, 0]), "of 1 or more"),
        (MAXVIT, r"SIZES is \[64, 56\], but build_maxvit_backbone takes multiples of 32"),
        ((f"{NODE}.MODE", "off", *MAXVIT), "squares of one size.*MODE is 'off'"),
        (
            (
                *("MODEL.BACKBONE.NAME", "build_resnet_cascade_fpn_backbone"),
                *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]),
                *("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p2", "p3"]),
            ),
            "has a pyramid.*Take build_resnet_backbone",
        ),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(ConfigError, match=message):
        build("parallel", *options)
