"""Weights of trunks that timm computes: official files and timm's."""

import pytest
import torch
from named_modules import named_module, noise
from torch import nn

from cascade_det.backbones.pvtv2 import PVTv2, PVTv2Shape
from cascade_det.weights import load_weights

PREFIX = "backbone.bottom_up."


def load(shapes, state, path):
    """Into a detector with a trunk of these shapes; the report in lines."""
    torch.save({"model": state}, path)
    model = named_module({PREFIX + name: shape for name, shape in shapes.items()})
    report = load_weights(model, path)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name.removeprefix(PREFIX)], rtol=0, atol=0)
    assert report.missing == report.unexpected == report.ambiguous == []
    return [line.strip() for line in str(report).splitlines()]


def test_official_pvt_v2(tmp_path):
    layers = ("norm1", "attn.q", "mlp.dwconv.dwconv")
    shapes = {f"block1.0.{layer}.weight": [6] for layer in layers}
    shapes |= {"patch_embed1.proj.weight": [6, 3, 7, 7], "norm1.bias": [6]}
    classifier = {"head.weight": [10, 6], "head.bias": [10]}
    told = load(shapes, noise(shapes | classifier), tmp_path / "pvt_v2.pth")
    assert "(PVTv2 names)" in told[0]
    assert "left out: the classifier (2 tensors)" in told
    assert "MODEL.PIXEL_STD [58.395, 57.12, 57.375]" in told[-1]


def test_timms_pvt_v2(tmp_path):
    """Its file gives our trunk its maps."""
    timm = pytest.importorskip("timm")
    sizes = {"embed_dims": (8, 8, 16, 24), "depths": (1, 2, 1, 1), "num_heads": (1, 1, 2, 3)}
    network = timm.create_model("pvt_v2_b0", num_classes=10, **sizes).eval()
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.3)
    torch.save(network.state_dict(), tmp_path / "timm.pth")
    trunk = PVTv2(shape=PVTv2Shape(*sizes.values())).eval()
    model = nn.ModuleDict({"backbone": nn.ModuleDict({"bottom_up": trunk})})
    report = load_weights(model, tmp_path / "timm.pth")
    assert report.missing == report.unexpected == report.ambiguous == []
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = network.forward_intermediates(images, intermediates_only=True)
        torch.testing.assert_close([*trunk(images).values()], expected)


def test_maxvit(tmp_path):
    shapes = {"stem.conv1.weight": [4, 3, 3, 3], "norm.weight": [6], "norm.bias": [6]}
    shapes["stages.0.blocks.0.attn_grid.attn.qkv.weight"] = [12, 4]
    told = load(shapes, noise(shapes | {"head.fc.weight": [10, 6]}), tmp_path / "maxvit.pth")
    assert "(MaxViT names)" in told[0]
    assert "left out: the classifier (1 tensors)" in told
    assert "MODEL.PIXEL_STD [127.5, 127.5, 127.5]" in told[-1]
