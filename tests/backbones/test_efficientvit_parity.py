"""EfficientViT against numbers and shapes of the official implementation."""

from dataclasses import replace

import pytest
import torch
from parity import check, description
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cascade_det.backbones.cascaded_attention import CascadedGroupAttention
from cascade_det.backbones.efficientvit import SHAPES, EfficientViT, EfficientViTShape
from cascade_det.backbones.efficientvit_layers import FFN, Block, PatchMerging
from cascade_det.backbones.efficientvit_neck import EfficientViTFPN

ATTENTION = ["cga_w7", "cga_w4", "cga_w7_h3"]
WINDOWED = ["equal_7x7", "multiple_14x21", "pad_9x12", "pad_h_10x5", "pad_w_3x8", "cls_10x10"]


@pytest.mark.parametrize("name", [*ATTENTION, *(f"lwa_{case}" for case in WINDOWED)])
def test_attention(name):
    config = description(name)["config"]
    attention = CascadedGroupAttention(
        config["dim"],
        heads=config["num_heads"],
        kernels=config["kernels"],
        window=config["window"],
    )
    # The recorded gradients of one window are not the derivatives of the recorded outputs: PyTorch
    # reads the strides of a gradient wrongly in the norms of the official code.
    gradients = None if name == "lwa_equal_7x7" else 5e-5
    prefix = "attn." if name.startswith("lwa") else ""
    check(name, attention, prefix=prefix, gradients=gradients)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("evit_ffn", FFN(16)),
        ("evit_patch_merging", PatchMerging(16, 24)),
        ("evit_patch_merging_se_round", PatchMerging(18, 24)),
        ("evit_block", Block(32, heads=2, kernels=(5, 5), window=7)),
    ],
)
def test_layers(name, layer):
    check(name, layer)


def shape_of(config, windows):
    return EfficientViTShape(
        tuple(config["embed_dim"]),
        tuple(config["depth"]),
        tuple(config["num_heads"]),
        tuple(config["kernels"]),
        windows,
    )


def test_a_small_detection_trunk():
    config = description("evit_small_backbone")["config"]
    trunk = EfficientViT(shape=shape_of(config, (4, 4, 4)), norm_eval=True).train()
    check("evit_small_backbone", trunk, lambda images: list(trunk(images).values()))


def add_head(trunk, name, channels, classes):
    """A linear classifier on the means of the last map."""
    head = nn.Sequential()
    head.add_module("bn", nn.BatchNorm1d(channels))
    head.add_module("l", nn.Linear(channels, classes))
    trunk.add_module(name, head)


@pytest.mark.parametrize(
    ("name", "windows", "heads"),
    [
        ("evit_small_classifier", (7, 4, 2), ["head"]),
        ("evit_small_distill", (2, 1, 1), ["head", "head_dist"]),
    ],
)
def test_a_small_classifier(name, windows, heads):
    config = description(name)["config"]
    trunk = EfficientViT(shape=shape_of(config, windows), out_features=["res6"]).train()
    for head in heads:
        add_head(trunk, head, config["embed_dim"][-1], config["num_classes"])
    if name == "evit_small_classifier":  # two samples only
        trunk.head.bn.eval()

    def run(images):
        means = trunk(images)["res6"].mean((2, 3))
        logits = [trunk.get_submodule(head)(means) for head in heads]
        return logits if trunk.training else [sum(logits) / len(logits)]

    check(name, trunk, run, tolerance=1e-3, gradients=1e-3)


class Maps(nn.Module):
    """A trunk that returns the maps it is given."""

    out_features = ("res4", "res5", "res6")

    def __init__(self, *widths):
        super().__init__()
        self.channels = dict(zip(self.out_features, widths, strict=True))

    def forward(self, maps):
        return dict(zip(self.out_features, maps, strict=True))


@pytest.mark.parametrize(("kind", "channels"), [("retinanet", 16), ("maskrcnn", 8)])
def test_necks(kind, channels):
    neck = EfficientViTFPN(Maps(16, 24, 32), kind=kind, out_channels=channels)
    check(f"evit_fpn_{kind}", neck, lambda *maps: list(neck(maps).values()))


PUBLISHED = {
    **{f"efficientvit_{name}": (name, (7, 7, 4), "") for name in SHAPES},
    **{
        f"efficientvit_{name}_detection_backbone": (name, (7, 7, 7), "_800x1344")
        for name in ("m0", "m4")
    },
}


@pytest.mark.parametrize("entry", PUBLISHED)
def test_names_shapes_and_costs(entry):
    name, windows, size = PUBLISHED[entry]
    expected = description("state_dict_shapes")[entry]
    counts = description("params_and_macs")[entry + size]
    shape = shape_of(expected["config"], windows)
    assert replace(SHAPES[name], windows=windows, kernels=shape.kernels) == shape
    # Named networks have the kernels of the classifiers.
    assert SHAPES[name].kernels == shape.kernels or entry == "efficientvit_m0_detection_backbone"
    # One block of each stage is counted: the others are alike.
    with torch.device("meta"):
        trunk = EfficientViT(shape=shape)
        if not size:
            add_head(trunk, "head", shape.channels[-1], 1000)
        single = EfficientViT(shape=replace(shape, depths=(1, 1, 1)))
        images = torch.empty(counts["input"][0])
    found = {key: list(tensor.shape) for key, tensor in trunk.state_dict().items()}
    shapes = expected["state_dict"].items()
    assert found == {k: v for k, v in shapes if not k.endswith("attention_bias_idxs")}
    assert sum(p.numel() for p in trunk.parameters()) == counts["params"]

    work = multiply_adds(single, images)
    blocks = ("blocks1.0", "blocks2.3", "blocks3.3")  # three layers lead to the later stages
    for block, depth in zip(blocks, shape.depths, strict=True):
        work["Global"] += (depth - 1) * work[f"EfficientViT.{block}"]
    # Without the linear layer of a head.
    published = counts["fvcore_conv_linear_matmul"] - counts["linear"]
    assert work["Global"] == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize("kind", ["retinanet", "maskrcnn"])
def test_names_shapes_and_costs_of_necks(kind):
    expected = description("state_dict_shapes")[f"efficientvit_fpn_{kind}_m4"]["state_dict"]
    counts = description("params_and_macs")[f"efficientvit_fpn_{kind}_m4_800x1344"]
    with torch.device("meta"):
        neck = EfficientViTFPN(Maps(128, 256, 384), kind=kind)
        maps = [torch.empty(size) for size in counts["input"]]
    assert {key: list(tensor.shape) for key, tensor in neck.state_dict().items()} == expected
    published = counts["fvcore_conv_linear_matmul"]
    assert multiply_adds(neck, maps)["Global"] == pytest.approx(published, rel=0.005)
    assert sum(p.numel() for p in neck.parameters()) == counts["params"]


def multiply_adds(module, *inputs):
    """By part; of all, ``Global``."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        module.eval()(*inputs)
    return {part: sum(counts.values()) / 2 for part, counts in counter.flop_counts.items()}
