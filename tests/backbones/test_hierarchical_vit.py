"""The hierarchical ViT: sizes, costs, what sees what, training, export."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from cascade_det.backbones.hierarchical_vit import HierarchicalViT
from cascade_det.backbones.window_attention import WindowAttention

SMALL = {"widths": (8, 16, 24), "depths": (1, 2, 1), "head_width": 8, "groups": 3}
STRIDES = {"res2": 4, "res3": 8, "res4": 16}


def make(**changes):
    torch.manual_seed(0)
    return HierarchicalViT(**{**SMALL, **changes}).eval()


def shaken(model):
    """With weights that are all far from zero, so that every part counts."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def test_tokens_parameters_and_multiply_adds_of_the_defaults_at_800_x_1344():
    """A closed form of the definition, against what the operators count, and the stated sums."""
    with torch.device("meta"):
        model = HierarchicalViT().eval()
        images = torch.zeros(1, 3, 800, 1344)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        maps = model(images)
    found = {name: sum(flops.values()) / 2 for name, flops in counter.flop_counts.items()}

    widths, depths = (64, 128, 256), (4, 6, 8)
    tokens = [(896 // size) * (1344 // size) for size in (4, 8, 16)]
    assert tokens == [75_264, 18_816, 4_704]
    embeddings = sum(3 * p**2 * c * n for p, c, n in zip((4, 8, 16), widths, tokens, strict=True))
    cross, stages = [], []
    for s, (c, n) in enumerate(zip(widths, tokens, strict=True)):
        keys = sum(49 * 4 ** (s - t) for t in range(s))
        projected = sum(2 * tokens[t] * widths[t] * c for t in range(s))
        cross.append(2 * n * c**2 + projected + 2 * n * keys * c if s else 0)
        # Convolution; q, k, v and output; scores and their sums; MLP.
        layer = n * c * (9 + 4 * c + 2 * 49 + 8 * c)
        stages.append(cross[-1] + depths[s] * layer)
    assert found["HierarchicalViT.stem"] == embeddings
    assert [found[f"HierarchicalViT.stages.{s}"] for s in range(3)] == stages
    assert [found[f"HierarchicalViT.stages.{s}.cross_scale"] for s in (1, 2)] == cross[1:]
    assert found["Global"] == embeddings + sum(stages)

    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == pytest.approx(8.2e6, rel=0.02)
    assert found["Global"] == pytest.approx(81.9e9, rel=0.02)
    assert cross[1:] == pytest.approx([2.8e9, 6.7e9], rel=0.02)
    assert {name: x.shape[1:] for name, x in maps.items()} == {
        "res2": (64, 200, 336),
        "res3": (128, 100, 168),
        "res4": (256, 50, 84),
    }


def test_without_cross_attention_stages_begin_with_the_norm_of_the_patches():
    model = shaken(make(depths=(0, 0, 0)))
    images = torch.randn(1, 3, 112, 112)
    for stage in model.stages[1:]:
        torch.nn.init.zeros_(stage.cross_scale.proj.weight)
        torch.nn.init.zeros_(stage.cross_scale.proj.bias)
    with torch.no_grad():
        maps = model(images)
        for x, size, conv, norm, stage in zip(
            maps.values(), (4, 8, 16), model.stem.convs, model.stem.norms, model.stages, strict=True
        ):
            # A patch is a row of pixels by channel, row and column.
            patches = torch.nn.functional.unfold(images, size, stride=size)[0].T
            embedded = patches @ conv.weight.flatten(1).T + conv.bias
            assert_close(x[0].flatten(1).T, stage.norm(norm(embedded)), atol=1e-4, rtol=1e-4)


def test_without_layers_a_pixel_changes_only_the_tokens_of_the_windows_that_cover_it():
    model = shaken(make(depths=(0, 0, 0)))
    images = torch.randn(1, 3, 224, 224)
    changed = images.clone()
    changed[:, :, 120, 37] += 10
    with torch.no_grad():
        before, after = model(images), model(changed)
    row, column = 120, 37
    for name, stride in STRIDES.items():
        differs = (before[name] != after[name])[0].any(0)
        side = 1 if name == "res2" else 7  # a stage that looks back does so by windows
        top, left = (x // (stride * side) * side for x in (row, column))
        expected = torch.zeros_like(differs)
        expected[top : top + side, left : left + side] = True
        assert torch.equal(differs, expected), name


def test_attention_in_windows_equals_a_loop():
    torch.manual_seed(0)
    module = shaken(WindowAttention(width=8, heads=2, window=3)).double()
    tokens = torch.randn(2, 18, 8).double()
    expected = torch.empty_like(tokens)
    with torch.no_grad():
        for image in range(2):
            for begin in (0, 9):
                window = module.qkv(tokens[image, begin : begin + 9])
                queries, keys, values = window.split(8, dim=1)
                for i in range(9):
                    found = []
                    for head in range(2):
                        part = slice(4 * head, 4 * head + 4)
                        scores = keys[:, part] @ queries[i, part] / 4**0.5
                        for j in range(9):
                            offset = (i // 3 - j // 3 + 2) * 5 + i % 3 - j % 3 + 2
                            scores[j] += module.attention_biases[head, offset]
                        found.append(scores.softmax(0) @ values[:, part])
                    expected[image, begin + i] = module.proj(torch.cat(found))
        assert_close(module(tokens), expected)


def test_a_stem_of_another_type():
    model = make()
    images = torch.randn(2, 3, 50, 130)
    half = make().to(torch.bfloat16)
    half.stem.float()
    with torch.no_grad():
        maps, halves = model(images), half(images)
    for name, x in maps.items():
        assert halves[name].dtype == torch.bfloat16
        assert_close(halves[name].float(), x, atol=0.1, rtol=0.05)


def test_branches_are_dropped_by_image_and_the_more_the_later():
    model = make(depths=(1, 2, 2), drop_path=0.4)
    layers = [layer for stage in model.stages for layer in stage.layers]
    assert [layer.drop_path.p for layer in layers] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])

    layer = shaken(make(depths=(1, 1, 0), drop_path=0.5)).stages[1].layers[0].train()
    torch.nn.init.zeros_(layer.conv.weight)
    torch.nn.init.zeros_(layer.conv.bias)
    x = torch.randn(16, 7, 14, 16)
    with torch.no_grad():
        changed = (layer(x) != x).flatten(1)
    kept = changed.all(1)
    assert torch.equal(kept, changed.any(1)), "all windows of an image or none"
    assert 0 < kept.sum() < 16


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch_sizes": (4, 16, 32)}, "twice the one before"),
        ({"patch_sizes": (2, 4, 8)}, "from 4 to 32"),
        ({"patch_sizes": (4, 8)}, "one of each"),
        ({"depths": (1, 1)}, "one of each"),
        ({"widths": (8, 16, 20)}, "multiples of the head width 8"),
        ({"mixer": "mean"}, "unknown mixer 'mean'; known: window, token_groups"),
        ({"out_features": ("res2", "res5")}, "res5"),
    ],
)
def test_impossible_arguments_are_errors(changes, words):
    with pytest.raises(ValueError, match=words):
        make(**changes)
