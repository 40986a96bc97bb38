"""MERIT against the official forward pass, and its laws."""

import parity
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cascade_det.backbones.cascade_decoder import CascadeDecoder
from cascade_det.backbones.maxvit import MaxViT
from cascade_det.segmentation.dual_scale import MODES, DualScaleNetwork

CHANNELS = (40, 32, 24, 16)
ENCODERS = {
    "small": ("maxxvit_rmlp_small_rw_256", "maxvit_rmlp_small_rw_224"),
    "tiny": ("maxvit_rmlp_tiny_rw_256", "maxvit_tiny_rw_224"),
}
EVERY = pytest.mark.parametrize("mode", MODES)


class StandIn(nn.Module):
    """The encoder of the vectors: average pooling and a 1x1 convolution per level."""

    out_features = ("res2", "res3", "res4", "res5")

    def __init__(self, channels=CHANNELS):
        super().__init__()
        self.channels = dict(zip(self.out_features, reversed(channels), strict=True))
        self.proj = nn.ModuleList(nn.Conv2d(3, width, 1) for width in reversed(channels))

    def forward(self, images):
        return {
            name: proj(F.avg_pool2d(images, 4 * 2**i))
            for i, (name, proj) in enumerate(zip(self.channels, self.proj, strict=True))
        }


def network(mode, **options):
    return DualScaleNetwork(
        backbones=(StandIn(), StandIn()),
        decoder=CascadeDecoder(CHANNELS),
        num_classes=2,
        sizes=(96, 64),
        mode=mode,
        **options,
    )


@EVERY
def test_official_network(mode):
    model = network(mode)
    parity.check(f"merit_{mode}", model, model)


@EVERY
@pytest.mark.parametrize("size", [(1, 1), (33, 150)])
def test_images_of_any_size_train_all(mode, size):
    model = network(mode)
    images = torch.randn(2, 1, *size, requires_grad=True)
    logits = model(images)
    assert [x.shape for x in logits] == [(2, 2, 96, 96)] * 4
    sum(x.square().mean() for x in logits).backward()
    for parameter in (images, *model.parameters()):
        assert parameter.grad.isfinite().all()


@EVERY
def test_colour_images_skip_the_stem_of_grey_ones(mode):
    model, grey = network(mode).eval(), torch.rand(1, 1, 96, 96)
    with torch.no_grad():
        expected = model(grey)
        found = model(model.conv(grey))
    torch.testing.assert_close(found, expected)
    assert "conv.0.weight" in model.state_dict()


def test_a_mask_of_ones_without_feedback_is_the_parallel_network():
    """A first encoder that sees nothing feeds nothing back."""
    cascaded, parallel = network("cascaded").eval(), network("parallel").eval()
    nn.init.zeros_(cascaded.out_head4_in.weight)
    nn.init.constant_(cascaded.out_head4_in.bias, 100.0)
    for parameter in cascaded.backbone1.parameters():
        nn.init.zeros_(parameter)
    state = cascaded.state_dict()
    parallel.load_state_dict({name: state[name] for name in parallel.state_dict()})
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(cascaded(images), parallel(images))


@pytest.mark.parametrize(("size", "mode"), [("small", "parallel"), ("tiny", "cascaded")])
def test_published_counts(size, mode):
    pytest.importorskip("timm")
    published = parity.description("params_and_macs")[f"MERIT_{mode.title()}_{size}_add"]
    with torch.device("meta"):
        first, second = (MaxViT(name=name) for name in ENCODERS[size])
        decoder = CascadeDecoder([*first.channels.values()][::-1])
        model = DualScaleNetwork(
            backbones=(first, second), decoder=decoder, num_classes=9, mode=mode
        ).eval()
        images = torch.empty(1, 3, 256, 256)
    assert sum(x.numel() for x in model.parameters()) == published["params"]
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
        model(images)
    assert counter.get_total_flops() == 2 * published["fvcore_conv_linear_matmul"]


def test_mistakes():
    with pytest.raises(ValueError, match="unknown mode 'both'; known: parallel, cascaded"):
        network("both")
    with pytest.raises(ValueError, match=r"encoder 2 has \(40, 32, 24, 20\) .* \(40, 32, 24, 16\)"):
        DualScaleNetwork(
            backbones=(StandIn(), StandIn((40, 32, 24, 20))),
            decoder=CascadeDecoder(CHANNELS),
            num_classes=2,
        )
