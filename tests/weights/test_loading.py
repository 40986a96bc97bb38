import logging
import pickle
import sys

import numpy as np
import pytest
import torch
from torch import nn

from cascade_det.errors import CheckpointError
from cascade_det.weights import load_weights, read_weights_file


class Conv(nn.Module):
    """A convolution with a norm inside, as Detectron2 nests them."""

    def __init__(self, out=2):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, 2))
        self.norm = nn.BatchNorm1d(out)


def module(**children):
    parent = nn.Module()
    for name, child in children.items():
        parent.add_module(name, child)
    return parent


def make_model(classes=5):
    """The names of a tiny Detectron2 cascade."""
    res2 = nn.Sequential(module(conv1=Conv(), shortcut=Conv()))
    bottom_up = module(stem=module(conv1=Conv()), res2=res2)
    predictors = [module(cls_score=nn.Linear(3, classes + 1)) for _ in range(3)]
    return module(
        backbone=module(bottom_up=bottom_up, fpn_lateral2=nn.Linear(2, 2)),
        proposal_generator=module(rpn_head=module(conv=nn.Linear(2, 2))),
        roi_heads=module(
            box_head=nn.ModuleList(module(fc1=nn.Linear(2, 3)) for _ in range(3)),
            box_predictor=nn.ModuleList(predictors),
        ),
    )


def assert_same(model, state):
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0, msg=name)


def save_pickle(path, content):
    path.write_bytes(pickle.dumps(content, protocol=2))


def save(state, path, form):
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    if form == "plain":
        torch.save(state, path)
    elif form == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    elif form == "zoo":
        content = {"model": arrays, "__author__": "Detectron2 Model Zoo"}
        save_pickle(path, content)
    elif form == "ddp":
        torch.save({"model": {f"module.{k}": v for k, v in state.items()}, "iteration": 7}, path)
    else:
        torch.save({form: state, "epoch": 3}, path)


FORMS = [
    ("a.pth", "plain"),
    ("a.pt", "plain"),
    ("a.pth", "model"),
    ("a.pth", "state_dict"),
    ("a.pth", "ddp"),
    ("a.PKL", "zoo"),
    ("a.safetensors", "safetensors"),
]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_every_form_of_file_loads_every_value(tmp_path, name, form):
    source = make_model()
    for buffer in source.buffers():
        buffer.add_(3)
    save(source.state_dict(), tmp_path / name, form)
    target = make_model()
    report = load_weights(target, tmp_path / name)
    assert_same(target, source.state_dict())
    important = [n for n in source.state_dict() if "num_batches" not in n]
    assert sorted(report.loaded) == sorted(important)
    assert report.total == len(important)
    assert report.missing == report.unexpected == []
    assert not report.reinitialised
    assert report.ambiguous == []
    assert str(report).count("\n") == 0
    assert read_weights_file(tmp_path / name).weights.keys() == source.state_dict().keys()


def test_report_says_what_became_of_everything(tmp_path, caplog):
    state = make_model(classes=80).state_dict()
    mask = {f"roi_heads.mask_head.mask_fcn{i}.{p}": torch.ones(1) for i in (1, 2) for p in "wb"}
    noise = {"pixel_mean": torch.ones(3, 1, 1), "anchor_generator.cell_anchors.0": torch.ones(4)}
    counts = [name for name in state if name.endswith("num_batches_tracked")]
    lacking = [name for name in state if name.startswith("proposal_generator")]
    for name in counts + lacking:
        del state[name]
    torch.save({"model": {**state, **mask, **noise}}, tmp_path / "zoo.pth")

    model = make_model(classes=4)
    with caplog.at_level(logging.INFO):
        report = load_weights(model, tmp_path / "zoo.pth")
    assert (
        list(report.reinitialised.values())
        == [
            ((81, 3), (5, 3)),
            ((81,), (5,)),
        ]
        * 3
    )
    assert report.missing == lacking
    assert report.unexpected == list(mask)
    text = str(report)
    loaded = len(report.loaded)
    assert f"{loaded} of the model's {loaded + 6 + 2} tensors loaded" in text
    assert (
        "roi_heads.box_predictor.0.cls_score.weight is (81, 3) in the file, (5, 3) in the model"
        in text
    )
    lines = [line.strip() for line in text.splitlines()]
    assert "roi_heads.mask_head (4 tensors)" in lines
    assert "proposal_generator (2 tensors)" in lines
    assert "mask_fcn" not in text
    assert "pixel_mean" not in text
    assert "num_batches" not in text
    assert text in caplog.text


def test_backbone_alone_finds_its_place_by_suffix(tmp_path):
    source, target = make_model(), make_model()
    prefix = "backbone.bottom_up."
    trunk = {k.removeprefix(prefix): v for k, v in source.state_dict().items() if prefix in k}
    before = {k: v.clone() for k, v in target.state_dict().items()}
    torch.save(trunk, tmp_path / "trunk.pth")
    report = load_weights(target, tmp_path / "trunk.pth")
    assert all(name.startswith(prefix) for name in report.loaded)
    assert_same(target, {**before, **{prefix + k: v for k, v in trunk.items()}})
    assert "roi_heads (" in str(report)


def test_longest_suffix_wins(tmp_path):
    model = module(
        a=module(conv=nn.Linear(1, 1, bias=False)), b=module(a=module(conv=nn.Linear(1, 1, False)))
    )
    # "a.conv.weight" is the model's own name, and also a suffix of "b.a.conv.weight".
    file = {"a.conv.weight": torch.full((1, 1), 1.0), "b.a.conv.weight": torch.full((1, 1), 2.0)}
    torch.save(file, tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth")
    assert (model.a.conv.weight.item(), model.b.a.conv.weight.item()) == (1, 2)


def test_suffix_is_whole_words(tmp_path):
    model = module(whatever_conv=nn.Linear(1, 1, False), x=module(conv=nn.Linear(1, 1, False)))
    before = model.whatever_conv.weight.item()
    torch.save({"conv.weight": torch.full((1, 1), 5.0)}, tmp_path / "w.pth")
    report = load_weights(model, tmp_path / "w.pth")
    assert model.x.conv.weight.item() == 5
    assert model.whatever_conv.weight.item() == before
    assert report.missing == ["whatever_conv.weight"]


def test_names_are_exact_where_some_fit_exactly(tmp_path):
    source = make_model().state_dict()
    stray = {"cls_score.bias": torch.zeros(6), **source}
    del stray["roi_heads.box_predictor.1.cls_score.bias"]
    torch.save(stray, tmp_path / "w.pth")
    report = load_weights(make_model(), tmp_path / "w.pth")
    assert report.missing == ["roi_heads.box_predictor.1.cls_score.bias"]
    assert report.unexpected == ["cls_score.bias"]


def test_weight_that_fits_three_stages_is_left_out_and_reported(tmp_path):
    model = make_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    blobs = {"conv1_w": np.ones((2, 2), "f4"), "cls_score_b": np.zeros(6, "f4")}
    save_pickle(tmp_path / "c2.pkl", {"blobs": blobs, "cfg": "text"})
    report = load_weights(model, tmp_path / "c2.pkl")
    assert report.ambiguous == ["cls_score.bias"]
    assert "fits several places" in str(report)
    assert report.loaded == ["backbone.bottom_up.stem.conv1.weight"]
    expected = {**before, "backbone.bottom_up.stem.conv1.weight": torch.ones(2, 2)}
    assert_same(model, expected)


def test_caffe2_backbone_with_folded_statistics(tmp_path):
    arrays = {
        "conv1_w": np.full((2, 2), 3, "f4"),
        "res_conv1_bn_s": np.array([2, 3], "f4"),
        "res_conv1_bn_b": np.array([4, 5], "f4"),
        "res2_0_branch2a_w": np.full((2, 2), 6, "f4"),
        "res2_0_branch1_w": np.full((2, 2), 7, "f4"),
        "fc1000_w": np.ones((4, 2), "f4"),
        "conv1_w_momentum": np.ones((2, 2), "f4"),
    }
    save_pickle(tmp_path / "R-50.pkl", arrays)
    model = make_model()
    norm = model.backbone.bottom_up.stem.conv1.norm
    norm.running_mean.fill_(9)
    norm.running_var.fill_(9)
    report = load_weights(model, tmp_path / "R-50.pkl")
    assert report.file.origin == "Caffe2"
    assert norm.weight.tolist() == [2, 3]
    assert norm.bias.tolist() == [4, 5]
    assert norm.running_mean.tolist() == [0, 0]
    assert norm.running_var.tolist() == [1, 1]
    assert model.backbone.bottom_up.res2[0].shortcut.weight.unique().tolist() == [7]
    assert report.unexpected == ["fc1000.weight"]
    assert not any("stem.conv1.norm" in name for name in report.missing)


def test_torchvision_trunk_by_suffix_with_a_hint(tmp_path):
    file = {
        "conv1.weight": torch.full((2, 2), 1.0),
        "bn1.weight": torch.full((2,), 2.0),
        "bn1.running_mean": torch.full((2,), 3.0),
        "bn1.running_var": torch.full((2,), 4.0),
        "layer1.0.conv1.weight": torch.full((2, 2), 5.0),
        "layer1.0.downsample.0.weight": torch.full((2, 2), 6.0),
        "fc.weight": torch.zeros(1),
    }
    torch.save(file, tmp_path / "resnet.pth")
    model = make_model()
    report = load_weights(model, tmp_path / "resnet.pth")
    trunk = model.backbone.bottom_up
    assert trunk.stem.conv1.norm.running_var.tolist() == [4, 4]
    assert trunk.res2[0].conv1.weight.unique().tolist() == [5]
    assert trunk.res2[0].shortcut.weight.unique().tolist() == [6]
    assert "INPUT.FORMAT RGB" in str(report)


def test_torchvision_mobilenet_by_suffix(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.mobilenet_v2(width_mult=0.25)
    torch.save(net.state_dict(), tmp_path / "mobilenet.pth")
    trunk = torchvision.models.mobilenet_v2(width_mult=0.25).features
    report = load_weights(
        module(backbone=module(bottom_up=module(features=trunk))), tmp_path / "mobilenet.pth"
    )
    assert_same(trunk, net.features.state_dict())
    assert not report.missing
    assert {name.split(".")[0] for name in report.unexpected} == {"classifier"}


@pytest.mark.needs_detectron2
def test_suffix_matching_equals_detectron2(tmp_path):
    loading = pytest.importorskip("detectron2.checkpoint.c2_model_loading")
    model = make_model()
    generator = torch.Generator().manual_seed(0)
    prefix = "backbone.bottom_up."
    names = [n for n in model.state_dict() if n.startswith(prefix) and "num_batches" not in n]
    file = {
        n.removeprefix(prefix): torch.randn(model.state_dict()[n].shape, generator=generator)
        for n in names
    }
    file["unrelated.weight"] = torch.zeros(1)
    expected = loading.align_and_update_state_dicts(model.state_dict(), file, c2_conversion=False)
    torch.save({"model": file, "matching_heuristics": True}, tmp_path / "w.pth")
    report = load_weights(model, tmp_path / "w.pth")
    assert set(report.loaded) == expected.keys() - {"unrelated.weight"}
    assert_same(model, {**model.state_dict(), **expected})


def test_nothing_fits_is_an_error(tmp_path):
    torch.save({"some.layer.kernel": torch.ones(3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth.*some\.layer\.kernel.*backbone"):
        load_weights(make_model(), tmp_path / "other.pth")


def test_nothing_fits_because_of_the_shapes(tmp_path):
    torch.save({"weight": torch.ones(3), "bias": torch.ones(9)}, tmp_path / "a.pth")
    with pytest.raises(
        CheckpointError, match=r"has bias \(9,\), weight \(3,\); .* \(2,\), weight \(2, 4\)"
    ):
        load_weights(nn.Linear(4, 2), tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ({"net": {"a": torch.ones(1)}}, "net.*'state_dict'"),
        ({"model": {}}, "nothing"),
        ([torch.ones(1)], "holds a list"),
        (torch.ones(1), "holds a Tensor"),
    ],
)
def test_files_without_weights(tmp_path, content, wanted):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=rf"a\.pth.*{wanted}"):
        read_weights_file(tmp_path / "a.pth")


def test_unknown_extension(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"a\.onnx.*\.pth, \.pt, \.pkl, \.safetensors"):
        read_weights_file(tmp_path / "a.onnx")


@pytest.mark.parametrize("keep", [0, 3, 200, 0.5, 0.99])
@pytest.mark.parametrize("name", ["a.pth", "a.pkl", "a.safetensors"])
def test_truncated_files(tmp_path, name, keep):
    forms = {"a.pth": "model", "a.pkl": "zoo", "a.safetensors": "safetensors"}
    save(make_model().state_dict(), tmp_path / name, forms[name])
    raw = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(raw[: int(len(raw) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=rf"{name}.*truncated"):
        read_weights_file(tmp_path / name)


def test_missing_safetensors_package_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "a.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(CheckpointError, match="pip install safetensors"):
        read_weights_file(tmp_path / "a.safetensors")
