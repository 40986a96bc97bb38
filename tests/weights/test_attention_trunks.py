"""Weights of EfficientViT and HAT-Net: official files, tables of biases, kernels."""

import math
import os
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from named_modules import named_module, noise
from parity import description, vectors
from torch import nn

from cascade_det.backbones import EfficientViT, HATNet
from cascade_det.backbones.relative_bias import RelativeBias
from cascade_det.errors import CheckpointError
from cascade_det.weights import load_weights
from cascade_det.weights.attention import resize_biases

PREFIX = "backbone.bottom_up."
HEADS = {"proposal_generator.rpn_head.conv.weight": [3, 3]}
RGB = "INPUT.FORMAT RGB, MODEL.PIXEL_MEAN [123.675, 116.28, 103.53], MODEL.PIXEL_STD [58.395, "


def batch_norm(name, width):
    statistics = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{x}": [width] for x in statistics} | {f"{name}.num_batches_tracked": []}


def conv_norm(name, *shape):
    return {f"{name}.c.weight": [*shape], **batch_norm(f"{name}.bn", shape[0])}


def efficientvit(windows=(7, 7, 7), kernels=(7, 5)):
    """Names and shapes of some of its layers, two heads per stage."""
    shapes = conv_norm("patch_embed.0", 4, 3, 3, 3)
    for stage, window in enumerate(windows, 1):
        attention = f"blocks{stage}.0.mixer.m.attn"
        shapes[f"{attention}.attention_biases"] = [2, window**2]
        for head, kernel in enumerate(kernels):
            shapes |= conv_norm(f"{attention}.qkvs.{head}", 40, 8, 1, 1)
            shapes |= conv_norm(f"{attention}.dws.{head}", 16, 1, kernel, kernel)
    return shapes


def efficientvit_file(windows=(7, 7, 4), kernels=(7, 5), head_names=("head",)):
    """What the official classifier has more than the trunk: indices and heads."""
    state = noise(efficientvit(windows, kernels))
    for stage, window in enumerate(windows, 1):
        index = torch.zeros(window**2, window**2, dtype=torch.int64)
        state[f"blocks{stage}.0.mixer.m.attn.attention_bias_idxs"] = index
    for head in head_names:
        state |= noise({**batch_norm(f"{head}.bn", 16), f"{head}.l.weight": [10, 16]})
        state[f"{head}.l.bias"] = torch.zeros(10)
    return state


def hat_net():
    shapes = {"patch_embed.0.weight": [4, 3, 3, 3], "patch_embed.0.bias": [4]}
    for block, part in product(range(2), ("attn.qkv", "attn.norm")):
        shapes[f"blocks.0.{block}.{part}.weight"] = [6]
    return shapes


def hat_net_file():
    more = {
        f"blocks.0.{block}.attn.proj_norm.{x}": [6] for block in (0, 1) for x in ("weight", "bias")
    }
    return noise({**hat_net(), **more, "classifier.1.weight": [10, 6], "classifier.1.bias": [10]})


def detector(trunk):
    return named_module({**{PREFIX + name: shape for name, shape in trunk.items()}, **HEADS})


@pytest.fixture
def file_of(tmp_path):
    def save(state, name="official.pth"):
        torch.save({"model": state}, tmp_path / name)
        return tmp_path / name

    return save


def assert_loaded(model, state, but=()):
    for name, value in model.state_dict().items():
        if name.startswith(PREFIX) and (short := name.removeprefix(PREFIX)) not in but:
            torch.testing.assert_close(value, state[short], rtol=0, atol=0, msg=name)


def lines_of(report):
    return [line.strip() for line in str(report).splitlines()]


def with_trunk(trunk):
    model = named_module(HEADS)
    model.backbone = nn.ModuleDict({"bottom_up": trunk})
    return model


class TestOfficialFiles:
    @pytest.mark.parametrize("form", ["pth", "safetensors"])
    @pytest.mark.parametrize("head_names", [("head",), ("head", "head_dist")])
    def test_the_trunk_is_loaded_and_the_classifier_left_out(self, form, head_names, tmp_path):
        state = efficientvit_file((7, 7, 7), head_names=head_names)
        path = tmp_path / f"efficientvit_m4.{form}"
        if form == "pth":
            torch.save({"model": state}, path)
        else:
            pytest.importorskip("safetensors.torch").save_file(state, path)
        model = detector(efficientvit())
        report = load_weights(model, path)
        assert_loaded(model, state)
        assert report.missing == [*HEADS]
        assert report.unexpected == report.ambiguous == []
        assert report.resized == report.reinitialised == {}
        count = 6 * len(head_names)
        assert lines_of(report)[1:4] == [
            "not in the file, left as initialised:",
            "proposal_generator (1 tensors)",
            f"left out: the classifier ({count} tensors)",
        ]
        assert "(EfficientViT names)" in str(report)
        assert RGB in str(report)
        assert "bias_idxs" not in str(report)

    def test_hat_net(self, file_of):
        state, model = hat_net_file(), detector(hat_net())
        report = load_weights(model, file_of(state))
        assert_loaded(model, state)
        assert report.unexpected == []
        told = lines_of(report)
        assert "left out: the classifier (2 tensors)" in told
        assert "left out: proj_norm, which HAT-Net never uses (4 tensors)" in told
        assert "(HAT-Net names)" in told[0]
        assert RGB in told[-1]

    def test_a_trunk_alone_is_loaded_by_its_own_names(self, file_of):
        state, trunk = hat_net_file(), named_module(hat_net())
        assert len(load_weights(trunk, file_of(state), complete=True).loaded) == len(hat_net())

    def test_a_network_that_has_them_gets_even_these(self, file_of):
        state = hat_net_file()
        model = named_module({f"net.{name}": list(value.shape) for name, value in state.items()})
        report = load_weights(model, file_of(state), complete=True)
        assert report.unused == {}
        assert all(
            torch.equal(v, state[k.removeprefix("net.")]) for k, v in model.state_dict().items()
        )

    def test_a_whole_detector_with_them_is_complete(self, file_of):
        """Matched exactly, though indices and ``proj_norm`` have no place."""
        trunk = efficientvit((7, 7, 7)) | hat_net()
        state = {
            PREFIX + k: v
            for k, v in (efficientvit_file((7, 7, 7), head_names=()) | hat_net_file()).items()
        }
        state = {k: v for k, v in state.items() if "classifier" not in k} | noise(HEADS)
        model = detector(trunk)
        report = load_weights(model, file_of(state), complete=True)
        assert report.missing == report.unexpected == []
        assert not report.file.matches_by_suffix
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    def test_the_classifier_may_hold_anything(self, file_of):
        state = efficientvit_file((7, 7, 7))
        state["head.l.weight"][0, 0] = math.nan
        load_weights(detector(efficientvit()), file_of(state))

    def test_other_files_with_such_names_are_told_of_them(self, file_of):
        state = {**noise({"net.x.weight": [2], "head.l.weight": [3]})}
        report = load_weights(named_module({"net.x.weight": [2]}), file_of(state))
        assert report.unexpected == ["head.l.weight"]
        assert report.unused == {}


def bicubic(grid, side):
    """By the definition (Keys 1981, a = -0.75): sixteen neighbours, the border repeated."""

    def weight(distance):
        x, a = abs(distance), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    old = len(grid)
    result = [[0.0] * side for _ in range(side)]
    for row, column in product(range(side), repeat=2):
        y, x = ((index + 0.5) * old / side - 0.5 for index in (row, column))
        for i, j in product(
            range(math.floor(y) - 1, math.floor(y) + 3), range(math.floor(x) - 1, math.floor(x) + 3)
        ):
            value = grid[min(max(i, 0), old - 1)][min(max(j, 0), old - 1)]
            result[row][column] += weight(y - i) * weight(x - j) * value
    return result


class TestTablesOfBiases:
    TABLE = "blocks3.0.mixer.m.attn.attention_biases"

    @given(old=st.integers(1, 8), new=st.integers(1, 8), seed=st.integers(0, 99))
    @settings(max_examples=30)
    def test_they_are_resized_by_bicubic_interpolation(self, old, new, seed):
        table = torch.randn(2, old * old, generator=torch.Generator().manual_seed(seed))
        found = resize_biases(table, new * new)
        expected = [bicubic(head.view(old, old).tolist(), new) for head in table]
        torch.testing.assert_close(
            found.view(2, new, new), torch.tensor(expected).double(), rtol=1e-6, atol=1e-6
        )

    def test_they_are_resized_as_by_the_official_loader(self):
        tables = vectors("evit_bias_resize")
        found = resize_biases(tables["table_4x4"], 49).float()
        torch.testing.assert_close(found, tables["table_7x7"], rtol=0, atol=2e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
    def test_an_official_files_last_stage(self, dtype, file_of):
        state = {k: v.to(dtype) for k, v in efficientvit_file((7, 7, 4)).items()}
        model = detector(efficientvit((7, 7, 7)))
        report = load_weights(model, file_of(state))
        name = PREFIX + self.TABLE
        assert report.resized == {name: ((2, 16), (2, 49))}
        assert name in report.loaded
        assert report.reinitialised == {}
        told = lines_of(report)
        place = told.index("resized, trained with another window of attention:")
        assert told[place + 1] == f"{name} is (2, 16) in the file, (2, 49) in the model"
        grids = state[self.TABLE].double().view(2, 4, 4).tolist()
        expected = torch.tensor([bicubic(grid, 7) for grid in grids]).view(2, 49)
        torch.testing.assert_close(model.state_dict()[name], expected)
        assert len(report.loaded) == report.total - len(HEADS)

    def test_signed_tables(self, file_of):
        source, model = (RelativeBias(3, window, signed=True) for window in (4, 7))
        source.attention_biases.data.copy_(torch.randn(3, 49))
        load_weights(model, file_of(source.state_dict()))
        grids = source.attention_biases.view(3, 7, 7).tolist()
        expected = torch.tensor([bicubic(grid, 13) for grid in grids]).view(3, 169)
        torch.testing.assert_close(model.attention_biases.detach(), expected)

    def test_detection_alone_needs_the_window_of_the_training(self, file_of):
        state = {PREFIX + k: v for k, v in noise(efficientvit((7, 7, 4))).items()} | noise(HEADS)
        model = detector(efficientvit((7, 7, 7)))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(CheckpointError, match="another window of attention") as caught:
            load_weights(model, file_of(state), complete=True)
        assert f"{PREFIX}{self.TABLE} is (2, 16) in the file, (2, 49) in the model" in str(
            caught.value
        )
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    @pytest.mark.parametrize("shape", [(2, 15), (3, 16), (2, 0), (2, 4, 4), (16,), ()])
    def test_what_is_no_table_of_these_heads_is_not_resized(self, shape, file_of):
        state = efficientvit_file((7, 7, 7)) | {self.TABLE: torch.randn(shape)}
        model = detector(efficientvit())
        name = PREFIX + self.TABLE
        before = model.state_dict()[name].clone()
        report = load_weights(model, file_of(state))
        assert report.resized == {}
        assert report.reinitialised == {name: (shape, (2, 49))}
        told = lines_of(report)
        place = told.index("reinitialised, the shape differs:")
        assert told[place + 1] == f"{name} is {shape} in the file, (2, 49) in the model"
        assert torch.equal(model.state_dict()[name], before)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_tables_that_are_no_numbers_are_an_error(self, value, file_of):
        state = efficientvit_file((7, 7, 4))
        state[self.TABLE][1, 3] = value
        with pytest.raises(CheckpointError, match=rf"holds NaN or Inf in {PREFIX}{self.TABLE}"):
            load_weights(detector(efficientvit()), file_of(state))


class TestKernels:
    def test_other_kernels_stay_as_initialised_and_the_remedy_is_named(self, file_of):
        state = efficientvit_file((7, 7, 7), kernels=(5, 5))
        model = detector(efficientvit(kernels=(7, 5)))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        path = file_of(state)
        report = load_weights(model, path)
        names = [f"blocks{stage}.0.mixer.m.attn.dws.0.c.weight" for stage in (1, 2, 3)]
        assert report.reinitialised == {
            PREFIX + name: ((16, 1, 5, 5), (16, 1, 7, 7)) for name in names
        }
        assert_loaded(model, state, but=names)
        assert all(torch.equal(model.state_dict()[PREFIX + x], before[PREFIX + x]) for x in names)
        assert "the convolutions of q have another kernel" in str(report)
        assert "kernels of the file, MODEL.EFFICIENTVIT.KERNELS '[5, 5, 5, 5]':" in str(report)
        assert "other classes" not in str(report)
        # The remedy works.
        assert load_weights(detector(efficientvit(kernels=(5, 5))), path).reinitialised == {}

    def test_kernels_that_stages_do_not_share_name_no_list(self, file_of):
        state = efficientvit_file((7, 7, 7), kernels=(5, 5))
        state["blocks2.0.mixer.m.attn.dws.1.c.weight"] = torch.zeros(16, 1, 3, 3)
        report = load_weights(detector(efficientvit(kernels=(7, 5))), file_of(state))
        assert len(report.reinitialised) == 4
        assert "give the model the kernels of the file:" in str(report)

    def test_detection_alone_needs_the_kernels_of_the_training(self, file_of):
        state = {PREFIX + k: v for k, v in noise(efficientvit(kernels=(5, 5))).items()}
        with pytest.raises(CheckpointError, match=r"another MODEL\.EFFICIENTVIT\.KERNELS"):
            load_weights(detector(efficientvit()), file_of(state | noise(HEADS)), complete=True)

    def test_other_shapes_are_not_put_down_to_kernels(self, file_of):
        name = "blocks1.0.mixer.m.attn.dws.0.c.weight"
        state = efficientvit_file((7, 7, 7)) | {name: torch.zeros(12, 1, 7, 7)}
        state["roi_heads.box_predictor.0.cls_score.weight"] = torch.zeros(81, 3)
        model = named_module(
            {PREFIX + k: v for k, v in efficientvit().items()}
            | {"roi_heads.box_predictor.0.cls_score.weight": [5, 3]}
        )
        told = lines_of(load_weights(model, file_of(state)))
        place = told.index("reinitialised, the shape differs:")
        assert told[place + 1].startswith(f"{PREFIX}{name} is (12, 1, 7, 7)")
        place = told.index("reinitialised, the shape differs (other classes, or class-agnostic?):")
        assert told[place + 1].startswith("roi_heads.box_predictor.0.cls_score.weight is (81, 3)")
        assert "KERNELS" not in "".join(told)


class TestTheReleases:
    """The official classifiers' own lists of names and shapes, into our trunks."""

    @pytest.mark.parametrize(
        ("size", "kernels"), [("m0", ()), ("m0", (7, 5, 3, 3)), ("m1", (5, 5, 5, 5)), ("m4", ())]
    )
    def test_efficientvit(self, size, kernels, file_of):
        state = noise(description("state_dict_shapes")[f"efficientvit_{size}"]["state_dict"])
        model = with_trunk(EfficientViT(name=size, kernels=kernels))
        report = load_weights(model, file_of(state))
        heads = 3 if size == "m1" else 4
        tables = [f"blocks3.{block}.mixer.m.attn.attention_biases" for block in (3, 4, 5)]
        assert report.resized == {PREFIX + name: ((heads, 16), (heads, 49)) for name in tables}
        others = [name.removeprefix(PREFIX) for name in report.reinitialised]
        # M1: heads 0 and 2, of 7 and 3; only the last five of its blocks have a head 2.
        assert len(others) == {("m0", (7, 5, 3, 3)): 18, ("m1", (5, 5, 5, 5)): 11}.get(
            (size, kernels), 0
        )
        assert all(".attn.dws." in name for name in others)
        remedy = {"m0": [5, 5, 5, 5], "m1": [7, 5, 3, 3]}.get(size)
        assert (f"MODEL.EFFICIENTVIT.KERNELS '{remedy}'" in str(report)) == bool(others)
        assert_loaded(model, state, but=[*tables, *others])
        assert report.missing == [*HEADS]
        assert report.unexpected == report.ambiguous == []
        assert {part: len(names) for part, names in report.unused.items()} == {"the classifier": 6}

    def test_hat_net(self, file_of):
        state = noise(description("state_dict_shapes")["hat_net_tiny"]["state_dict"])
        model = with_trunk(HATNet(name="tiny"))
        report = load_weights(model, file_of(state))
        assert_loaded(model, state)
        assert report.missing == [*HEADS]
        assert [len(names) for names in report.unused.values()] == [26, 2]
        assert report.unexpected == report.ambiguous == []


LAYERS = {
    "backbone.bottom_up.blocks1.0.mixer.m.attn.attention_biases": "the backbone (1 of 1 ",
    "backbone.lateral_convs.0.conv.weight": "the FPN (1 of 7 ",
    "backbone.fpn_convs.2.conv.bias": "the FPN (1 of 7 ",
    "backbone.extra_trans_convs.0.conv.weight": "the FPN (1 of 7 ",
    "backbone.extra_fpn_convs.0.conv.weight": "the FPN (1 of 7 ",
    "backbone.top_block.p6.weight": "the FPN (1 of 7 ",
    "backbone.fpn_output3.weight": "the FPN (1 of 7 ",
    "backbone.decoder.ConvBlock1.conv.0.weight": "the FPN (1 of 7 ",
}


@pytest.mark.parametrize(("name", "part"), LAYERS.items())
class TestLayersOfBackbones:
    def test_one_that_is_missing_is_named_with_its_part(self, name, part, file_of):
        shapes = dict.fromkeys(LAYERS, (2, 9))
        state = noise(shapes)
        del state[name]
        with pytest.raises(CheckpointError) as caught:
            load_weights(named_module(shapes), file_of(state), complete=True)
        assert f"lacks {part}" in str(caught.value)
        assert name in str(caught.value)

    def test_one_too_many_is_of_another_architecture(self, name, part, file_of):
        fewer = dict.fromkeys(LAYERS.keys() - {name}, (2, 9))
        path = file_of(noise({**fewer, name: (2, 9)}))
        assert load_weights(named_module(fewer), path).unexpected == [name]
        with pytest.raises(CheckpointError, match="of another architecture") as caught:
            load_weights(named_module(fewer), path, complete=True)
        assert f"has {name}, which" in str(caught.value)


class Calls:
    """Pickled, it is a call."""

    def __init__(self, *command):
        self.command = command

    def __reduce__(self):
        return os.system, self.command


@pytest.mark.parametrize(
    "place", ["patch_embed.0.c.weight", "attention_bias_idxs", "head.l.weight", ""]
)
def test_a_file_that_would_call_something_is_refused(place, tmp_path):
    victim = tmp_path / "victim"
    content = {"model": efficientvit_file()}
    target = content["model"] if place else content
    name = next((key for key in target if key.endswith(place)), "args") if place else "args"
    target[name] = Calls(f"touch {victim}")
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: refused.*system"):
        load_weights(detector(efficientvit()), tmp_path / "a.pth")
    assert not victim.exists()
