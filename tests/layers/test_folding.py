"""Folded norms: the same function with fewer layers."""

import copy

import pytest
import torch
from torch import nn

from cascade_det.backbones import FPN, MobileNetV3Large, ResNet
from cascade_det.layers.conv_norm import ConvNorm, FrozenBatchNorm2d
from cascade_det.layers.folding import fold_norms

NORMS = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)


def with_statistics(module):
    """Norms that do something."""
    for norm in module.modules():
        if isinstance(norm, NORMS):
            nn.init.uniform_(norm.running_mean, -0.3, 0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.3, 0.3)
    return module.eval()


@pytest.mark.parametrize(
    "trunk",
    [
        lambda: ResNet(depth=18, norm="BN", freeze_at=2, out_features=("res2", "res3")),
        lambda: ResNet(depth=50, norm="FrozenBN", out_features=("res2",)),
        lambda: MobileNetV3Large(norm="SyncBN", out_features=("res2", "res3")),
    ],
    ids=["R-18", "R-50", "mobilenet"],
)
@torch.no_grad()
def test_a_trunk_computes_the_same_without_its_norms(trunk):
    plain = with_statistics(trunk())
    folded = copy.deepcopy(plain)
    count = fold_norms(folded)
    assert count == sum(isinstance(m, NORMS) for m in plain.modules())
    assert not any(isinstance(m, NORMS) for m in folded.modules())
    image = torch.randn(1, 3, 64, 64)
    for name, expected in plain(image).items():
        torch.testing.assert_close(folded(image)[name], expected, atol=1e-4, rtol=1e-4)


def test_one_channel_by_hand():
    conv = ConvNorm(1, 1, 1, norm="FrozenBN")
    conv.norm.eps = 0.0
    values = (conv.weight, conv.norm.running_mean, conv.norm.running_var, conv.norm.weight)
    for tensor, value in zip((*values, conv.norm.bias), (3.0, 5.0, 4.0, 6.0, 1.0), strict=True):
        nn.init.constant_(tensor, value)
    assert fold_norms(nn.Sequential(conv)) == 1
    # (3 x - 5) / 2 * 6 + 1
    assert conv.weight.item() == 9.0
    assert conv.bias.item() == -14.0


def test_norms_without_fixed_statistics_stay():
    fpn = FPN(ResNet(depth=18, norm="BN", freeze_at=0, out_features=("res2",)), norm="GN")
    assert fold_norms(fpn.train()) == 0
    assert isinstance(fpn.get_submodule("fpn_lateral2").norm, nn.GroupNorm)
    fold_norms(fpn.eval())
    assert isinstance(fpn.get_submodule("fpn_lateral2").norm, nn.GroupNorm)
