"""PVTv2 against the official network; what holds for any trunk is in test_trunks."""

import sys

import pytest
import torch
from parity import check, description
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cascade_det.backbones.pvtv2 import SHAPES, PVTv2, PVTv2Shape
from cascade_det.errors import ConfigError

pytest.importorskip("timm")


def test_official_network():
    config = description("pvtv2_small")["config"]
    names = ("embed_dims", "depths", "num_heads", "mlp_ratios", "sr_ratios")
    shape = PVTv2Shape(*(tuple(config[name]) for name in names))
    trunk = PVTv2(shape=shape, drop_path=0.0)
    check("pvtv2_small", trunk, lambda images: list(trunk(images).values()))


def test_official_names_shapes_and_counts():
    official = description("state_dict_shapes")["pvt_v2_b2"]["state_dict"]
    published = description("params_and_macs")["pvt_v2_b2"]
    with torch.device("meta"):
        trunk, images = PVTv2().eval(), torch.empty(1, 3, 224, 224)
    assert {name: list(x.shape) for name, x in trunk.state_dict().items()} == official
    assert sum(x.numel() for x in trunk.parameters()) == published["params"]
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
        trunk(images)
    assert counter.get_total_flops() == 2 * published["fvcore_conv_linear_matmul"]


@pytest.mark.parametrize("name", sorted(SHAPES.keys() - {"b2"}))
def test_published_parameters_of_the_others(name):
    """In millions, with the classifier, as timm lists them."""
    published = {"b0": 3.67, "b1": 14.01, "b3": 45.24, "b4": 62.56, "b5": 81.96}[name]
    with torch.device("meta"):
        trunk = PVTv2(name=name)
    classifier = 1000 * (trunk.channels["res5"] + 1)
    count = sum(x.numel() for x in trunk.parameters()) + classifier
    assert round(count / 1e6, 2) == published


def test_drop_path_rises_over_all_blocks():
    """Whichever stages are built."""
    shape = PVTv2Shape((8, 8, 8, 8), (1, 2, 1, 1), (1, 1, 1, 1))
    trunk = PVTv2(shape=shape, out_features=("res3",), drop_path=0.2)
    blocks = [*trunk.block1, *trunk.block2]
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0, 0.05, 0.1])


def test_mistakes(monkeypatch):
    with pytest.raises(ValueError, match=r"unknown PVTv2 'b9'; known: b0, b1"):
        PVTv2(name="b9")
    with pytest.raises(ValueError, match="res6"):
        PVTv2(out_features=("res6",))
    monkeypatch.setitem(sys.modules, "timm.models.pvt_v2", None)
    with pytest.raises(ConfigError, match=r"PVTv2 is built from timm.*pip install timm"):
        PVTv2()
