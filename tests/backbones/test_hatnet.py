"""HAT-Net against what the official network computes, plain loops and its own laws."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_near, check, description, vectors
from small_backbones import TRUNKS, make_trunk
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cascade_det.backbones import HATNet
from cascade_det.backbones.hatnet import SHAPES, HATNetShape, InvertedResidual
from cascade_det.backbones.hierarchical_attention import HierarchicalAttention


def randomise(module, seed=0):
    """Noise for all parameters, with which every mechanism shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            noise *= 0.9 * parameter[0].numel() ** -0.5
        parameter.data.copy_(noise)
    return module


class TestOfficialNetwork:
    """The same numbers, names, parameters and multiply-adds."""

    @pytest.mark.parametrize("case", ["local_global", "ds_floor", "plain"])
    def test_attention(self, case):
        config = description(f"hat_attention_{case}")["config"]
        attention = HierarchicalAttention(
            config["dim"],
            head_width=config["head_dim"],
            grid=config["grid_size"],
            pooling=config["ds_ratio"],
        )
        check(f"hat_attention_{case}", attention)

    def test_inverted_residual(self):
        config = description("hat_inverted_residual")["config"]
        module = InvertedResidual(
            config["in_dim"], config["hidden_dim"], kernel=config["kernel_size"]
        )
        check("hat_inverted_residual", module)

    def test_whole_network(self):
        config, tensors = description("hat_small")["config"], vectors("hat_small")
        names = ("dims", "depths", "kernel_sizes", "expansions", "grid_sizes", "ds_ratios")
        channels, depths, *others = (tuple(config[name]) for name in names)
        shape = HATNetShape(channels, config["head_dim"], depths, *others)
        network = HATNet(shape=shape, drop_path=0)
        network.classifier = nn.Sequential(nn.Dropout(0), nn.Linear(channels[-1], 10))
        check("hat_small", network, lambda x: [network.classifier(network(x)["res5"].mean((2, 3)))])
        with torch.no_grad():
            maps = network(tensors["input.0"])
        for i, stage_output in enumerate(maps.values()):
            assert_near(stage_output, tensors[f"stage_output.{i}"], 2e-5)

    @pytest.mark.parametrize("name", SHAPES)
    def test_names_and_counts(self, name):
        official = description("state_dict_shapes")[f"hat_net_{name}"]["state_dict"]
        published = description("params_and_macs")[f"hat_net_{name}"]
        with torch.device("meta"):
            trunk = HATNet(name=name)
        shapes = {key: list(value.shape) for key, value in trunk.state_dict().items()}
        rest = official.keys() - shapes.keys()
        assert {key: official[key] for key in official.keys() - rest} == shapes
        assert all("proj_norm" in key or key.startswith("classifier.") for key in rest)

        shape = SHAPES[name]
        classifier = 1000 * shape.channels[-1]
        unused = 2 * np.dot(shape.depths, shape.channels)
        ours = sum(parameter.numel() for parameter in trunk.parameters())
        assert ours + classifier + 1000 + unused == published["params"]

        # One block of each stage is counted: the others are alike.
        single = replace(shape, depths=(1, 1, 1, 1))
        with torch.device("meta"):
            trunk, images = HATNet(shape=single).eval(), torch.empty(1, 3, 224, 224)
        counter = FlopCounterMode(display=False)
        with sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
            trunk(images)
        flops = {part: sum(found.values()) for part, found in counter.flop_counts.items()}
        for i, depth in enumerate(shape.depths):
            flops["Global"] += (depth - 1) * flops[f"HATNet.blocks.{i}.0"]
        work = flops["Global"] / 2 + classifier
        assert work == pytest.approx(published["fvcore_conv_linear_matmul"], rel=0.005)


class NaiveAttention:
    """H-MHSA by loops over grids, heads and tokens; one image in float64."""

    def __init__(self, module):
        self.module = module

    def __call__(self, image):
        """``[C, H, W]`` to the same shape."""
        if self.module.grid > 1:
            image = self.norm(image + self.local(image), "grid_norm")
            image = image + self.pooled(image)
            return self.linear(image, "proj")
        positions = list(np.ndindex(*image.shape[1:]))
        return self.linear(self.attend(self.norm(image, "norm"), "qkv", positions), "proj")

    def local(self, image):
        grid, (height, width) = self.module.grid, image.shape[1:]
        padded = torch.zeros(len(image), height + grid, width + grid, dtype=image.dtype)
        padded[:, :height, :width] = self.norm(image, "norm")
        result = torch.zeros_like(padded)
        for top, left in itertools.product(range(0, height, grid), range(0, width, grid)):
            positions = [(top + i, left + j) for i in range(grid) for j in range(grid)]
            result += self.attend(padded, "qkv", positions)
        return result[:, :height, :width]

    def pooled(self, image):
        height, width = image.shape[1:]
        tall, wide = (min(self.module.pooling, side) for side in (height, width))
        areas = [
            [image[:, i : i + tall, j : j + wide].mean((1, 2)) for j in starts(width, wide)]
            for i in starts(height, tall)
        ]
        small = torch.stack([torch.stack(row, dim=1) for row in areas], dim=1)
        keys, values = self.linear(self.norm(small, "ds_norm"), "kv").flatten(1).chunk(2)
        queries, result = self.linear(image, "q"), torch.zeros_like(image)
        for i, j in np.ndindex(height, width):
            result[:, i, j] = self.token(queries[:, i, j], keys, values)
        return result

    def attend(self, image, layer, positions):
        """The tokens at these positions to each other; zeros elsewhere."""
        queries, keys, values = self.linear(image, layer).chunk(3)
        rows, columns = zip(*positions, strict=True)
        result = torch.zeros_like(image)
        for i, j in positions:
            result[:, i, j] = self.token(
                queries[:, i, j], keys[:, rows, columns], values[:, rows, columns]
            )
        return result

    def token(self, query, keys, values):
        """``[C]`` to all of ``[C, S]``, head by head."""
        size = self.module.proj.in_channels // self.module.heads
        parts = []
        for start in range(0, len(query), size):
            head = slice(start, start + size)
            weights = torch.exp(query[head] @ keys[head] / size**0.5)
            parts.append(values[head] @ (weights / weights.sum()))
        return torch.cat(parts)

    def linear(self, image, layer):
        conv = self.module.get_submodule(layer)
        return (
            torch.einsum("oc,chw->ohw", conv.weight[:, :, 0, 0], image) + conv.bias[:, None, None]
        )

    def norm(self, image, layer):
        norm = self.module.get_submodule(layer)
        scaled = (image - image.mean()) / (image.var(correction=0) + 1e-6).sqrt()
        return scaled * norm.weight[:, None, None] + norm.bias[:, None, None]


def starts(side, step):
    return range(0, side - step + 1, step)


@settings(max_examples=25)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    heads=st.integers(1, 2),
    grid=st.integers(1, 4),
    pooling=st.integers(1, 5),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_attention_is_that_of_plain_loops(height, width, heads, grid, pooling, channels_last, seed):
    module = HierarchicalAttention(3 * heads, head_width=3, grid=grid, pooling=pooling)
    randomise(module.double(), seed)
    images = torch.randn(
        2, 3 * heads, height, width, generator=torch.Generator().manual_seed(seed)
    ).double()
    if channels_last:
        module, images = (x.to(memory_format=torch.channels_last) for x in (module, images))
    with torch.no_grad():
        expected = torch.stack([NaiveAttention(module)(image) for image in images])
        torch.testing.assert_close(module(images), expected)


def test_maps_keep_the_layout_of_the_images():
    """In which a pyramid reads them without a copy."""
    images = torch.randn(2, 3, 50, 77)
    for layout in (torch.contiguous_format, torch.channels_last):
        trunk = make_trunk("hatnet").to(memory_format=layout)
        for x in trunk(images.contiguous(memory_format=layout)).values():
            assert x.is_contiguous(memory_format=layout)


class TestDropPath:
    """Stochastic depth."""

    def test_rates_rise_linearly(self):
        """Whichever stages are built."""
        trunk = TRUNKS["hatnet"](out_features=("res4",), drop_path=0.2)
        rates = [block.drop_path.p for stage in trunk.blocks for block in stage]
        assert rates == pytest.approx([0, 0.05, 0.1, 0.15])

    def test_the_last_block_is_dropped(self):
        """At a rate of 1 its input is its output; evaluation drops nothing."""
        trunk, images = make_trunk("hatnet", drop_path=1.0), torch.randn(2, 3, 40, 40)
        before = []
        trunk.blocks[3][0].register_forward_pre_hook(lambda _, x: before.append(x[0].clone()))
        with torch.no_grad():
            kept = trunk(images)["res5"]
            dropped = trunk.train()(images)["res5"]
        torch.testing.assert_close(dropped, before[1], rtol=0, atol=0)
        torch.testing.assert_close(kept, make_trunk("hatnet")(images)["res5"])
        assert (kept - before[0]).abs().mean() > 0.1


def test_mistakes():
    with pytest.raises(ValueError, match=r"unknown HAT-Net 'huge'; known: tiny, small"):
        HATNet(name="huge")
    with pytest.raises(ValueError, match="res6"):
        HATNet(out_features=("res6",))
