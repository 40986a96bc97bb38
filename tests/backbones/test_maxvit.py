"""MERIT's encoders against the official ones and timm's own."""

import sys
from dataclasses import replace

import pytest
import torch
from parity import check, description
from torch import nn

from cascade_det.backbones.maxvit import SIDES, MaxViT
from cascade_det.errors import ConfigError

timm = pytest.importorskip("timm")
BLOCKS = {
    "maxvit_block_mbconv": "maxvit_rmlp_small_rw",
    "maxvit_block_mbconv_table": "maxvit_tiny_rw",
    "maxxvit_block_convnext": "maxxvit_rmlp_small_rw",
}


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return MaxViT(name="maxvit_tiny_rw_224").eval()


@pytest.mark.parametrize("case", BLOCKS)
def test_blocks_of_the_encoders_are_the_official_ones(case):
    """With what timm configures for the encoder, but for the sizes."""
    from timm.models import maxxvit

    config, encoder = description(case)["config"], maxxvit.model_cfgs[BLOCKS[case]]
    sizes = {"dim_head": config.get("dim_head", 32), "rel_pos_dim": config.get("rel_pos_hidden", 0)}
    windows = {"window_size": (config["window"],) * 2, "grid_size": (config["grid"],) * 2}
    block = maxxvit.MaxxVitBlock(
        config["dim"],
        config["dim_out"],
        stride=config["stride"],
        conv_cfg=encoder.conv_cfg,
        transformer_cfg=replace(encoder.transformer_cfg, **sizes, **windows),
    )
    for module in block.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    check(case, block)


@pytest.mark.parametrize("name", SIDES)
def test_official_names_and_shapes(name):
    """Their multiply-adds are counted within MERIT."""
    official = description("state_dict_shapes")[f"merit_backbone_{name}"]["state_dict"]
    published = description("params_and_macs")[f"merit_backbone_{name}"]
    with torch.device("meta"):
        encoder = MaxViT(name=name)
    assert {key: list(x.shape) for key, x in encoder.state_dict().items()} == official
    assert sum(x.numel() for x in encoder.parameters()) == published["params"]


def test_maps_are_timms(tiny):
    """The last one is normalised, the others are not."""
    nn.init.normal_(tiny.norm.weight)
    other = timm.create_model("maxvit_tiny_rw_224", num_classes=0).eval()
    other.load_state_dict(tiny.state_dict())
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        _, *expected = other.forward_intermediates(images, norm=True, intermediates_only=True)
        found = tiny(images)
        without_last = MaxViT(name="maxvit_tiny_rw_224", out_features=("res3",)).eval()
        state = tiny.state_dict()
        without_last.load_state_dict({key: state[key] for key in without_last.state_dict()})
        torch.testing.assert_close(without_last(images), {"res3": expected[1]})
    torch.testing.assert_close(found, dict(zip(found, expected, strict=True)))
    assert {key: x.shape[1:] for key, x in found.items()} == {
        f"res{i}": (tiny.channels[f"res{i}"], 224 // 2**i, 224 // 2**i) for i in range(2, 6)
    }
    assert len(without_last.state_dict()) < 0.5 * len(state)


def test_images_of_another_side():
    """Windows and grids grow with the image; weights are the same."""
    small, large = (MaxViT(name="maxvit_rmlp_tiny_rw_256", side=side).eval() for side in (64, 96))
    large.load_state_dict(small.state_dict())
    with torch.no_grad():
        maps = large(torch.randn(1, 3, 96, 96))
    assert {key: x.shape[2:] for key, x in maps.items()} == {
        f"res{i}": (96 // 2**i, 96 // 2**i) for i in range(2, 6)
    }


def test_stem_and_stages_are_all_there_is(tiny):
    with torch.device("meta"):
        part = MaxViT(name="maxvit_tiny_rw_224", out_features=("res2",))
    for encoder in (tiny, part):
        stem, stages = encoder.stem_and_stages()
        parts = [id(p) for part in (stem, *stages) for p in part.parameters()]
        assert sorted(parts) == sorted(map(id, encoder.parameters()))


def test_frozen_parts_are_not_trained():
    with torch.device("meta"):
        encoder = MaxViT(name="maxvit_tiny_rw_224", freeze_at=2)
    frozen = ("stem.", "stages.0.")
    for mode in (True, False, True):
        encoder.train(mode)
        for key, module in encoder.named_modules():
            assert module.training == (mode and not f"{key}.".startswith(frozen)), key
    for key, parameter in encoder.named_parameters():
        assert parameter.requires_grad != key.startswith(frozen), key


def test_mistakes(tiny, monkeypatch):
    with pytest.raises(ValueError, match=r"unknown MaxViT 'maxvit'; known: maxvit_tiny_rw_224"):
        MaxViT(name="maxvit")
    with pytest.raises(ValueError, match=r"multiples of 32, not 240"):
        MaxViT(name="maxvit_tiny_rw_224", side=240)
    with pytest.raises(ValueError, match=r"tiny_rw_224 takes images of 224 x 224 .* 224 x 256"):
        tiny(torch.zeros(1, 3, 224, 256))
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"maxvit_tiny_rw_224 is built from timm.*\[timm\]"):
        MaxViT(name="maxvit_tiny_rw_224")
