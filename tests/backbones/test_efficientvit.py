"""What holds for every EfficientViT, without recorded numbers."""

import copy
import math

import pytest
import torch
import torch.fx.experimental._config
from torch import nn
from torch.testing import assert_close

from cascade_det.backbones.efficientvit import EfficientViT, EfficientViTShape
from cascade_det.backbones.efficientvit_neck import EfficientViTFPN
from cascade_det.backbones.relative_bias import gather_biases
from cascade_det.layers.conv_norm import FrozenBatchNorm2d
from cascade_det.layers.folding import fold_norms

SHAPE = EfficientViTShape((16, 16, 32), (1, 1, 1), (1, 2, 2), (5, 3), (3, 3, 3))
ALL = ("res2", "res3", "res4", "res5", "res6")
SIZES = [(1, 1), (2, 63), (17, 300), (65, 64)]


def make_trunk(*, seed=0, **arguments):
    """A small one whose norms and biases are random, in evaluation mode."""
    torch.manual_seed(seed)
    trunk = EfficientViT(**{"shape": SHAPE, **arguments})
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            for name in ("weight", "running_var"):
                getattr(module, name).data.uniform_(0.5, 1.5)
            for name in ("bias", "running_mean"):
                getattr(module, name).data.normal_(std=0.3)
    for name, parameter in trunk.named_parameters():
        if name.endswith("attention_biases"):
            nn.init.normal_(parameter)
    return trunk.eval()


def run(model, images):
    with torch.no_grad():
        return model(images)


def assert_same(found, expected, **tolerances):
    assert found.keys() == expected.keys()
    for name, map_ in found.items():
        assert_close(map_, expected[name], **tolerances)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_channels_of_maps(size):
    trunk = make_trunk(out_features=ALL)
    maps = run(trunk, torch.randn(2, 3, *size))
    assert list(maps) == list(ALL)
    for level, (name, map_) in enumerate(maps.items(), start=2):
        sides = [math.ceil(side / 2**level) for side in size]
        assert list(map_.shape) == [2, trunk.channels[name], *sides]
        assert map_.isfinite().all()


def test_a_batch_is_its_images_one_by_one():
    trunk = make_trunk(out_features=ALL).double()
    images = torch.randn(3, 3, 70, 130, dtype=torch.float64)
    alone = [run(trunk, image[None]) for image in images]
    expected = {name: torch.cat([maps[name] for maps in alone]) for name in ALL}
    assert_same(run(trunk, images), expected)


def test_channels_last_images_give_the_same_maps():
    trunk = make_trunk().double()
    images = torch.randn(2, 3, 70, 130, dtype=torch.float64)
    other = copy.deepcopy(trunk).to(memory_format=torch.channels_last)
    assert_same(
        run(other, images.contiguous(memory_format=torch.channels_last)), run(trunk, images)
    )


def test_bfloat16():
    images = torch.randn(1, 3, 64, 96)
    trunk = make_trunk()
    for name, map_ in run(copy.deepcopy(trunk).bfloat16(), images.bfloat16()).items():
        expected = run(trunk, images)[name]
        assert map_.dtype == torch.bfloat16
        assert (map_ - expected).norm() < 0.1 * expected.norm()


def test_fine_maps_are_those_of_the_stem_after_its_activations():
    trunk = make_trunk(out_features=ALL)
    maps = run(trunk, torch.randn(1, 3, 64, 64))
    x = maps["res2"]
    assert (x.min(), trunk.channels["res2"]) == (0, 4)
    with torch.no_grad():
        x = trunk.patch_embed[5](trunk.patch_embed[4](x))
        assert_close(x, maps["res3"])
        assert_close(trunk.blocks1(trunk.patch_embed[6](x)), maps["res4"])


@pytest.mark.parametrize(
    ("last", "stem", "stages"), [("res2", 4, 0), ("res3", 6, 0), ("res5", 7, 2)]
)
def test_later_layers_are_not_built(last, stem, stages):
    trunk, full = make_trunk(out_features=[last]), make_trunk(out_features=ALL)
    first, others = trunk.stem_and_stages()
    assert (len(first), len(others)) == (stem, stages)
    state = {k: v for k, v in full.state_dict().items() if k in trunk.state_dict()}
    trunk.load_state_dict(state)
    images = torch.randn(1, 3, 40, 40)
    assert_close(run(trunk, images)[last], run(full, images)[last])


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="unknown EfficientViT 'M4'; known: m0, m1"):
        EfficientViT(name="M4")
    with pytest.raises(ValueError, match=r"unknown features \['res7'\]"):
        EfficientViT(out_features=["res7"])


def test_norms_folded_and_biases_gathered_give_the_same_maps():
    trunk = make_trunk().double()
    images = torch.randn(1, 3, 70, 130, dtype=torch.float64)
    expected = run(trunk, images)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in trunk.modules())
    assert fold_norms(trunk) == norms
    assert gather_biases(trunk) == 3
    assert_same(run(trunk, images), expected)


def backward(trunk, images):
    """Gradients of the sum of all maps times fixed noise."""
    generator = torch.Generator().manual_seed(1)
    sum(
        (map_ * torch.randn(map_.shape, generator=generator)).sum()
        for map_ in trunk(images).values()
    ).backward()
    return {name: parameter.grad for name, parameter in trunk.named_parameters()}


def test_fixed_norms_are_trained_but_for_their_statistics():
    trunk = make_trunk(norm_eval=True).double()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    state = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    found = backward(trunk.train(), images)
    assert_same(trunk.state_dict(), state)
    # PyTorch's own modules, in evaluation mode, on an equal network.
    plain = make_trunk().double()
    norms = [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
    for module in plain.modules():
        if hasattr(module, "bn"):
            module.forward = lambda x, module=module: module.bn(module.c(x))
    expected = backward(plain, images)
    assert len(norms) > 20
    assert_same(found, expected)


@pytest.mark.parametrize("freeze_at", [0, 1, 2, 4])
def test_frozen_parts(freeze_at):
    trunk = make_trunk(freeze_at=freeze_at).train()
    stem, stages = trunk.stem_and_stages()
    before = copy.deepcopy(trunk.state_dict())
    backward(trunk, torch.randn(2, 3, 64, 96).requires_grad_())
    for i, part in enumerate([stem, *stages]):
        assert all((p.grad is None) == (i < freeze_at) for p in part.parameters())
    changed = {k for k, v in trunk.state_dict().items() if not torch.equal(v, before[k])}
    frozen = ("patch_embed", "blocks1", "blocks2", "blocks3")[:freeze_at]
    assert not [name for name in changed if name.startswith(frozen)]


@pytest.mark.parametrize("kind", ["retinanet", "maskrcnn"])
def test_a_neck_freezes_the_layers_without_a_gradient(kind):
    torch.manual_seed(0)
    neck = EfficientViTFPN(make_trunk().requires_grad_(False), kind=kind, out_channels=4)
    maps = neck(torch.randn(1, 3, 64, 96))
    for name, output in maps.items():
        neck.zero_grad(set_to_none=True)
        output.square().sum().backward(retain_graph=True)
        copied = copy.deepcopy(neck)
        copied.freeze_unread([name])
        for (key, parameter), frozen in zip(
            neck.named_parameters(), copied.parameters(), strict=True
        ):
            assert frozen.requires_grad == (parameter.grad is not None), (name, key)
    copied = copy.deepcopy(neck)
    copied.freeze_unread(maps)
    assert [p.requires_grad for p in copied.parameters()] == [
        p.requires_grad for p in neck.parameters()
    ]


@pytest.mark.parametrize("kind", ["retinanet", "maskrcnn"])
def test_a_neck_has_maps_of_its_strides(kind):
    neck = EfficientViTFPN(make_trunk(), kind=kind, out_channels=4)
    maps = run(neck, torch.randn(2, 3, 96, 32))
    assert list(maps) == list(neck.strides)
    for name, map_ in maps.items():
        sides = [math.ceil(side / neck.strides[name]) for side in (96, 32)]
        assert list(map_.shape) == [2, 4, *sides]
    takers, others = neck.laterals_and_outputs()
    parts = {id(p) for part in [neck.bottom_up, *takers, *others] for p in part.parameters()}
    assert parts == {id(parameter) for parameter in neck.parameters()}
    # Takers fit the trunk's maps, the others the neck's own.
    widths = [next(part.parameters()).shape[1] for part in takers]
    assert set(widths) == {16, 32}


def test_a_neck_needs_its_features():
    with pytest.raises(ValueError, match="needs the features"):
        EfficientViTFPN(make_trunk(out_features=["res3", "res4"]))
    with pytest.raises(ValueError, match="unknown pyramid 'fpn'; known: retinanet, maskrcnn"):
        EfficientViTFPN(make_trunk(), kind="fpn")


class Listed(nn.Module):
    """Outputs in order, as exporters have them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return list(self.model(images).values())


def test_an_exported_program_takes_images_of_other_sizes():
    model = Listed(make_trunk(out_features=["res4"])).eval()
    sides = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    # Otherwise a program that cuts padding off takes only images for which it must.
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        program = torch.export.export(
            model, (torch.randn(1, 3, 97, 160),), dynamic_shapes=(sides,), strict=False
        )
    for size in [(224, 65), (96, 144)]:
        images = torch.randn(1, 3, *size)
        assert_close(program.module()(images), run(model, images))


def test_an_onnx_file_takes_images_of_other_sizes(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Listed(EfficientViTFPN(make_trunk(), out_channels=4)).eval()
    path = tmp_path / "trunk.onnx"
    torch.onnx.export(
        model,
        (torch.randn(1, 3, 96, 160),),
        str(path),
        input_names=["image"],
        dynamic_axes={"image": {2: "height", 3: "width"}},
        opset_version=18,
        dynamo=False,
    )
    others = torch.randn(1, 3, 224, 64)
    found = onnxruntime.InferenceSession(path).run(None, {"image": others.numpy()})
    for output, map_ in zip(found, run(model, others), strict=True):
        assert_close(torch.from_numpy(output), map_, rtol=1e-4, atol=1e-5)
