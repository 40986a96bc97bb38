"""Fast upsampling against the plain one."""

import pytest
import torch
from lively_heads import lively
from torch.testing import assert_close

from cascade_det.backbones.cascade_decoder import CascadeDecoder
from cascade_det.backbones.decoder_blocks import UpConv
from cascade_det.backbones.fast_upconv import FastUpConv, use_fast_upconv
from cascade_det.layers.folding import fold_norms

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [None, (10, 14), (9, 14), (5, 7)])
@pytest.mark.parametrize("fold", [False, True])
def test_the_same_as_the_plain_one(size, layout, fold):
    up = lively(UpConv(24, 16)).to(memory_format=layout)
    x = torch.randn(2, 24, 5, 7).contiguous(memory_format=layout)
    expected = up(x, size)
    if fold:
        fold_norms(up)
    found = FastUpConv(up)(x, size)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=layout)


@torch.no_grad()
def test_in_a_decoder():
    decoder = lively(CascadeDecoder((48, 32, 16)))
    maps = [torch.randn(1, *shape) for shape in [(48, 2, 3), (32, 4, 6), (16, 9, 12)]]
    expected, names = decoder(maps), list(decoder.state_dict())
    assert use_fast_upconv(decoder) == 2
    assert_close(decoder(maps), expected, rtol=1e-5, atol=1e-5)
    assert list(decoder.state_dict()) == names
    assert use_fast_upconv(decoder) == 0
    assert use_fast_upconv(CascadeDecoder((16, 16))) == 0  # in training mode
