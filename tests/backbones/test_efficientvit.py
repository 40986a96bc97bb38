"""What holds for every EfficientViT, without recorded numbers."""

import copy
import math
from functools import partial

import pytest
import small_backbones
import torch
from parity import assert_near
from torch import nn
from torch.testing import assert_close

from cascade_det.backbones.efficientvit import EfficientViT
from cascade_det.backbones.efficientvit_neck import EfficientViTFPN

STAGES = ("res4", "res5", "res6")
make_trunk = partial(small_backbones.make_trunk, "efficientvit")


def make_neck(**options):
    return EfficientViTFPN(make_trunk(out_features=STAGES), out_channels=4, **options)


def run(model, images):
    with torch.no_grad():
        return model(images)


def test_fine_maps_are_those_of_the_stem_after_its_activations():
    trunk = make_trunk()
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
    trunk, full = make_trunk(out_features=[last]), make_trunk()
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
    assert_close(trunk.state_dict(), state)
    # PyTorch's own modules, in evaluation mode, on an equal network.
    plain = make_trunk().double()
    norms = [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
    for module in plain.modules():
        if hasattr(module, "bn"):
            module.forward = lambda x, module=module: module.bn(module.c(x))
    expected = backward(plain, images)
    assert len(norms) > 20
    assert_close(found, expected)


@pytest.mark.parametrize("kind", ["retinanet", "maskrcnn"])
def test_a_neck_freezes_the_layers_without_a_gradient(kind):
    torch.manual_seed(0)
    neck = EfficientViTFPN(
        make_trunk(out_features=STAGES).requires_grad_(False), kind=kind, out_channels=4
    )
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
    neck = make_neck(kind=kind)
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
        EfficientViTFPN(make_trunk(out_features=STAGES), kind="fpn")


def test_an_onnx_file_of_a_neck_takes_images_of_other_sizes(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = small_backbones.Listed(
        EfficientViTFPN(make_trunk(out_features=STAGES), out_channels=4)
    ).eval()
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
        assert_near(torch.from_numpy(output), map_, 5e-5)
