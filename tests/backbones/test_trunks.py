"""What holds for every trunk with attention: sizes, layouts, types, freezing, export."""

import copy
import itertools

import pytest
import torch
from parity import assert_near
from small_backbones import TRUNKS, Listed, make_trunk
from torch.fx.experimental import _config as symbolic_config
from torch.testing import assert_close

from cascade_det.backbones.relative_bias import RelativeBias, gather_biases
from cascade_det.backbones.trunk import LEVELS
from cascade_det.layers.folding import fold_norms

# Names of the stem and of each stage.
_HIERVIT = ("stem.",), ("stages.0.",), ("stages.1.",), ("stages.2.",)
PARTS = {
    "efficientvit": (("patch_embed.",), ("blocks1.",), ("blocks2.",), ("blocks3.",)),
    "hatnet": (("patch_embed.",), ("blocks.0.",), ("ds2.", "blocks.1."), ("ds3.", "blocks.2.")),
    "hiervit": _HIERVIT,
    "pvtv2": (
        ("patch_embed1.",),
        ("block1.", "norm1."),
        ("patch_embed2.", "block2.", "norm2."),
        ("patch_embed3.", "block3.", "norm3."),
    ),
    "hiervit_groups": _HIERVIT,
}
EVERY = pytest.mark.parametrize("name", TRUNKS)


@EVERY
@pytest.mark.parametrize("size", [(1, 1), (17, 300), (96, 64)])
def test_images_of_any_size_train_all(name, size):
    trunk = make_trunk(name).train()
    images = torch.randn(2, 3, *size, requires_grad=True)
    maps = trunk(images)
    assert tuple(maps) == trunk.out_features
    for feature, x in maps.items():
        rows = tuple(-(-side // 2 ** LEVELS[feature]) for side in size)
        assert x.shape == (2, trunk.channels[feature], *rows)
    sum(x.square().mean() for x in maps.values()).backward()
    for parameter in (images, *trunk.parameters()):
        assert parameter.grad.isfinite().all()
    assert (images.grad != 0).any()


@EVERY
def test_a_batch_is_its_images_in_any_layout_with_and_without_gradients(name):
    trunk, images = make_trunk(name).double(), torch.randn(2, 3, 50, 77).double()
    with torch.no_grad():
        singles = [trunk(image[None]) for image in images]
    expected = {feature: torch.cat([maps[feature] for maps in singles]) for feature in singles[0]}
    for layout, context in itertools.product(
        (torch.contiguous_format, torch.channels_last),
        (torch.enable_grad, torch.no_grad, torch.inference_mode),
    ):
        given = images.clone(memory_format=layout)
        with context():
            maps = copy.deepcopy(trunk).to(memory_format=layout)(given)
        assert_close(maps, expected)
        assert torch.equal(given, images)


@EVERY
def test_bfloat16_and_autocast_stay_near(name):
    trunk, images = make_trunk(name), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = trunk(images)
        with torch.autocast("cpu", torch.bfloat16):
            cast = trunk(images)
        maps = trunk.bfloat16()(images.bfloat16())
    for feature, x in expected.items():
        assert maps[feature].dtype == torch.bfloat16
        for rounded in (maps[feature], cast[feature]):
            assert (rounded - x).norm() < 0.1 * x.norm()


@EVERY
def test_gradients_are_derivatives(name):
    """Along a random direction of the images and all parameters at once."""
    trunk = make_trunk(name).double()
    images = torch.randn(2, 3, 40, 24, dtype=torch.float64, requires_grad=True)
    arguments = [images, *trunk.parameters()]
    directions = [torch.randn_like(x) for x in arguments]
    weights = {name: torch.randn_like(x) for name, x in trunk(images).items()}

    def run(step=0.0):
        with torch.no_grad():
            for x, direction in zip(arguments, directions, strict=True):
                x += step * direction
        return sum((x * weights[name]).sum() for name, x in trunk(images).items())

    gradients = torch.autograd.grad(run(), arguments)
    expected = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    step = 1e-6
    found = (run(step) - run(-2 * step)) / (2 * step)
    assert_close(found, expected, rtol=1e-5, atol=0)


@EVERY
@pytest.mark.parametrize("freeze_at", [0, 1, 2, 4])
def test_frozen_parts_are_not_trained(name, freeze_at):
    trunk = make_trunk(name, freeze_at=freeze_at).train()
    frozen = tuple(itertools.chain(*PARTS[name][:freeze_at]))
    for key, parameter in trunk.named_parameters():
        assert parameter.requires_grad != key.startswith(frozen), key
    before = {key: value.clone() for key, value in trunk.state_dict().items()}
    trunk(torch.randn(2, 3, 32, 32))
    moved = [k for k, v in trunk.state_dict().items() if not torch.equal(v, before[k])]
    assert not [key for key in moved if key.startswith(frozen)]


@EVERY
def test_stem_and_stages_are_all_there_is_and_what_is_not_needed_is_not_built(name):
    full, images = make_trunk(name), torch.randn(1, 3, 40, 40)
    part = make_trunk(name, out_features=("res3",))
    assert part.channels == {"res3": full.channels["res3"]}
    for trunk in (full, part):
        stem, stages = trunk.stem_and_stages()
        parts = [id(p) for part in (stem, *stages) for p in part.parameters()]
        assert sorted(parts) == sorted(map(id, trunk.parameters()))
    state = full.state_dict()
    assert len(part.state_dict()) < 0.7 * len(state)
    part.load_state_dict({key: state[key] for key in part.state_dict()})
    with torch.no_grad():
        assert_close(part(images), {"res3": full(images)["res3"]})


@EVERY
def test_folded_norms_and_gathered_biases_change_nothing(name):
    trunk, images = make_trunk(name).double(), torch.randn(1, 3, 50, 77).double()
    with torch.no_grad():
        expected = trunk(images)
        norms = [m for m in trunk.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert fold_norms(trunk) == len(norms)
        biases = [m for m in trunk.modules() if isinstance(m, RelativeBias)]
        assert gather_biases(trunk) == len(biases)
        assert_close(trunk(images), expected)


class TestExport:
    """With dynamic sizes: single windows, several with and without padding."""

    def check(self, model, exported):
        for size in ((64, 160), (224, 96), (150, 230)):
            images = torch.randn(1, 3, *size)
            with torch.no_grad():
                expected = model(images)
                for found, x in zip(exported(images), expected, strict=True):
                    assert_near(found, x, 5e-5)

    @pytest.mark.parametrize(
        ("name", "last"),
        [
            ("efficientvit", "res6"),
            ("hatnet", "res5"),
            ("pvtv2", "res5"),
            ("hiervit", "res4"),
            ("hiervit_groups", "res3"),
        ],
    )
    @pytest.mark.filterwarnings("ignore")  # this exporter is the old one
    def test_onnx(self, name, last, tmp_path):
        onnxruntime = pytest.importorskip("onnxruntime")
        path = tmp_path / "trunk.onnx"
        model = Listed(make_trunk(name, out_features=(last,))).eval()
        torch.onnx.export(
            model,
            (torch.randn(1, 3, 96, 128),),
            str(path),
            input_names=["images"],
            dynamic_axes={"images": {2: "height", 3: "width"}},
            opset_version=18,
            dynamo=False,
        )
        session = onnxruntime.InferenceSession(path)
        self.check(model, lambda x: map(torch.from_numpy, session.run(None, {"images": x.numpy()})))

    # As far as there is another kind of layer; token groups are exported in a test of their own.
    @pytest.mark.parametrize(
        ("name", "last"),
        [("efficientvit", "res4"), ("hatnet", "res2"), ("hiervit", "res3"), ("pvtv2", "res3")],
    )
    def test_torch_export(self, name, last):
        model = Listed(make_trunk(name, out_features=(last,))).eval()
        sides = {i: torch.export.Dim(f"side{i}", min=33, max=65536) for i in (2, 3)}
        # Otherwise it would only take images with as many windows as the example, or more than one.
        with torch.no_grad(), symbolic_config.patch(backed_size_oblivious=True):
            program = torch.export.export(
                model,
                (torch.randn(1, 3, 96, 128),),
                dynamic_shapes=(sides,),
                prefer_deferred_runtime_asserts_over_guards=True,
            )
        self.check(model, program.module())
