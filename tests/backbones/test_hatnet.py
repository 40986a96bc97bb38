"""HAT-Net against what the official network computes, plain loops and its own laws."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_near, check, description, vectors
from torch import nn
from torch.fx.experimental import _config as symbolic_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cascade_det.backbones import HATNet
from cascade_det.backbones.hatnet import LAYOUTS, Block, HATNetLayout, InvertedResidual
from cascade_det.backbones.hierarchical_attention import HierarchicalAttention
from cascade_det.backbones.windows import pad_to_multiple

SMALL = HATNetLayout((8, 8, 12, 16), 4, (1, 2, 1, 1), kernels=(5, 3, 3, 3), expansions=(2, 2, 2, 2))
STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


def randomise(module, seed=0):
    """Noise for all parameters, with which every mechanism shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            noise *= 0.9 * parameter[0].numel() ** -0.5
        parameter.data.copy_(noise)
    return module


def small_trunk(**options):
    return randomise(HATNet(name=SMALL, **options)).eval()


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
        layout = HATNetLayout(channels, config["head_dim"], depths, *others)
        network = HATNet(name=layout, drop_path=0)
        network.classifier = nn.Sequential(nn.Dropout(0), nn.Linear(channels[-1], 10))
        check("hat_small", network, lambda x: [network.classifier(network(x)["res5"].mean((2, 3)))])
        with torch.no_grad():
            maps = network(tensors["input.0"])
        for i, stage_output in enumerate(maps.values()):
            assert_near(stage_output, tensors[f"stage_output.{i}"], 2e-5)

    @pytest.mark.parametrize("name", LAYOUTS)
    def test_names_and_counts(self, name):
        official = description("state_dict_shapes")[f"hat_net_{name}"]["state_dict"]
        published = description("params_and_macs")[f"hat_net_{name}"]
        with torch.device("meta"):
            trunk, images = HATNet(name=name).eval(), torch.empty(1, 3, 224, 224)
        shapes = {key: list(value.shape) for key, value in trunk.state_dict().items()}
        rest = official.keys() - shapes.keys()
        assert {key: official[key] for key in official.keys() - rest} == shapes
        assert all("proj_norm" in key or key.startswith("classifier.") for key in rest)

        layout = LAYOUTS[name]
        classifier = 1000 * layout.channels[-1]
        unused = 2 * np.dot(layout.depths, layout.channels)
        ours = sum(parameter.numel() for parameter in trunk.parameters())
        assert ours + classifier + 1000 + unused == published["params"]

        counter = FlopCounterMode(display=False)
        with sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
            trunk(images)
        work = counter.get_total_flops() / 2 + classifier
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


@settings(max_examples=25, deadline=None)
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


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 300), (2, 7), (17, 300), (31, 33), (224, 224)]
)
def test_any_size(height, width):
    trunk = small_trunk().train()
    images = torch.randn(2, 3, height, width, requires_grad=True)
    maps = trunk(images)
    assert {name: m.shape[2:] for name, m in maps.items()} == {
        name: (-(-height // stride), -(-width // stride)) for name, stride in STRIDES.items()
    }
    sum(m.square().mean() for m in maps.values()).backward()
    assert images.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in trunk.parameters())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_batch_is_its_images(memory_format, context):
    """In any layout, with and without gradients."""
    trunk, images = small_trunk(), torch.randn(3, 3, 50, 77)
    with torch.no_grad():
        singles = [trunk(image[None]) for image in images]
    expected = {name: torch.cat([maps[name] for maps in singles]) for name in STRIDES}
    trunk = trunk.to(memory_format=memory_format)
    given_images = images.clone(memory_format=memory_format)
    with context():
        maps = trunk(given_images)
    torch.testing.assert_close(given_images, images, rtol=0, atol=0)
    for name, value in maps.items():
        assert_near(value, expected[name], 2e-6)
        assert value.is_contiguous(memory_format=memory_format)


def test_bfloat16():
    trunk, images = small_trunk(), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected, maps = trunk(images), trunk.bfloat16()(images.bfloat16())
    for name, value in maps.items():
        assert value.dtype == torch.bfloat16
        assert (value - expected[name]).square().mean() < 1e-3 * expected[name].square().mean()


@pytest.mark.parametrize("grid", [1, 2])
def test_gradients_are_those_of_finite_differences(grid):
    attention = HierarchicalAttention(2, head_width=1, grid=grid, pooling=2)
    block = randomise(Block(attention, InvertedResidual(2, 4, kernel=3), drop_path=0).double())
    images = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: block(x), (images, *block.parameters()))


def test_freezing():
    frozen = ()
    for freeze_at, prefixes in enumerate([(), ("patch_",), ("blocks.0.",), ("ds2.", "blocks.1.")]):
        frozen += prefixes
        for name, parameter in small_trunk(freeze_at=freeze_at).named_parameters():
            assert parameter.requires_grad != name.startswith(frozen), name


def test_later_stages_are_not_built():
    trunk = small_trunk(out_features=("res2", "res3"))
    assert list(trunk(torch.randn(1, 3, 40, 40))) == ["res2", "res3"]
    assert trunk.channels == {"res2": 8, "res3": 8}
    assert not [n for n, _ in trunk.named_modules() if n.startswith(("blocks.2", "ds3", "ds4"))]
    stem, stages = trunk.stem_and_stages()
    parts = {id(p) for module in (stem, *stages) for p in module.parameters()}
    assert parts == {id(p) for p in trunk.parameters()}


class TestDropPath:
    """Stochastic depth."""

    def test_rates_rise_linearly(self):
        """Whichever stages are built."""
        trunk = HATNet(name=SMALL, out_features=("res4",), drop_path=0.2)
        rates = [block.drop_path.p for stage in trunk.blocks for block in stage]
        assert rates == pytest.approx([0, 0.05, 0.1, 0.15])

    def test_the_last_block_is_dropped(self):
        """At a rate of 1 its input is its output; evaluation drops nothing."""
        trunk, images = small_trunk(drop_path=1), torch.randn(2, 3, 40, 40)
        before = []
        trunk.blocks[3][0].register_forward_pre_hook(lambda _, x: before.append(x[0].clone()))
        with torch.no_grad():
            kept = trunk(images)["res5"]
            dropped = trunk.train()(images)["res5"]
        torch.testing.assert_close(dropped, before[1], rtol=0, atol=0)
        torch.testing.assert_close(kept, small_trunk(drop_path=0)(images)["res5"])
        assert (kept - before[0]).abs().mean() > 0.1


class Padded(nn.Module):
    """A trunk as a detector calls it, for images padded to multiples of 32."""

    def __init__(self):
        super().__init__()
        # Two stages with grids and a plain one.
        layout = replace(SMALL, depths=(1, 1, 1, 1), grids=(8, 7, 1, 1))
        features = ("res2", "res3", "res4")
        self.trunk = randomise(HATNet(name=layout, out_features=features))
        self.eval()

    def forward(self, images):
        return list(self.trunk(pad_to_multiple(images, 32)).values())


class TestExport:
    """With dynamic sizes: single grids, several with and without padding."""

    sizes = ((64, 30), (224, 112), (150, 230))

    def check(self, network, exported):
        for size in self.sizes:
            images = torch.randn(1, 3, *size)
            with torch.no_grad():
                expected = network(images)
            for actual, value in zip(exported(images), expected, strict=True):
                assert_near(actual, value, 1e-5)

    @pytest.mark.filterwarnings("ignore")  # this exporter is the old one
    def test_onnx(self, tmp_path):
        onnxruntime = pytest.importorskip("onnxruntime")
        network, path = Padded(), tmp_path / "trunk.onnx"
        torch.onnx.export(
            network,
            (torch.randn(1, 3, 96, 128),),
            str(path),
            input_names=["images"],
            dynamic_axes={"images": {2: "height", 3: "width"}},
            opset_version=18,
            dynamo=False,
        )
        session = onnxruntime.InferenceSession(path)
        self.check(
            network, lambda x: map(torch.from_numpy, session.run(None, {"images": x.numpy()}))
        )

    def test_torch_export(self):
        network = Padded()
        sides = {i: torch.export.Dim(f"side{i}", min=2, max=65536) for i in (2, 3)}
        # Otherwise it would only take images with as many grids as the example, or more than one.
        with torch.no_grad(), symbolic_config.patch(backed_size_oblivious=True):
            program = torch.export.export(
                network,
                (torch.randn(1, 3, 96, 128),),
                dynamic_shapes=(sides,),
                prefer_deferred_runtime_asserts_over_guards=True,
            )
        with torch.no_grad():
            self.check(network, program.module())


def test_mistakes():
    with pytest.raises(ValueError, match=r"no HAT-Net called 'huge'; known: tiny, small"):
        HATNet(name="huge")
    with pytest.raises(ValueError, match="res6"):
        HATNet(out_features=("res6",))
