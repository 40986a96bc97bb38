"""Attention to finer maps, against a loop over windows, heads and tokens."""

import pytest
import torch
from torch.testing import assert_close

from cascade_det.backbones.cross_scale_attention import CrossScaleAttention


def make(finer, *, width=8, heads=2, window=2):
    torch.manual_seed(0)
    return CrossScaleAttention(width=width, heads=heads, window=window, finer=finer).double()


def window_of(maps, row, column, side):
    """Tokens of one window of a map ``[H, W, C]``, row by row."""
    tokens = maps[row * side : (row + 1) * side, column * side : (column + 1) * side]
    return tokens.reshape(-1, maps.shape[-1])


def by_loop(module, x, finer):
    """The definition, window by window, head by head, query by query, for one image."""
    side, heads, width = module.window, module.heads, x.shape[-1]
    result = torch.full_like(x, torch.nan)
    for row in range(x.shape[0] // side):
        for column in range(x.shape[1] // side):
            queries = module.q(module.norm(window_of(x, row, column, side)))
            pairs = []
            for maps, ratio, norm, kv in zip(
                finer, module.ratios, module.finer_norms, module.kv, strict=True
            ):
                pairs.append(kv(norm(window_of(maps, row, column, side * ratio))))
            keys, values = torch.cat(pairs).split(width, dim=1)
            for i, query in enumerate(queries):
                found = []
                for part in torch.arange(width).chunk(heads):
                    scores = keys[:, part] @ query[part] / len(part) ** 0.5
                    found.append(scores.softmax(0) @ values[:, part])
                place = row * side + i // side, column * side + i % side
                result[place] = module.proj(torch.cat(found))
    return result


def test_windows_see_the_aligned_windows_of_all_finer_maps():
    module = make([(4, 4), (6, 2)])
    x = torch.randn(2, 4, 6, 8).double()
    finer = [torch.randn(2, 16, 24, 4).double(), torch.randn(2, 8, 12, 6).double()]
    with torch.no_grad():
        found = module(x, *finer)
        for image in range(2):
            expected = by_loop(module, x[image], [maps[image] for maps in finer])
            assert_close(found[image], expected)


def test_a_constant_finer_map_gives_its_value_projection():
    module = make([(4, 2)])
    token = torch.randn(4).double()
    with torch.no_grad():
        found = module(torch.randn(1, 4, 4, 8).double(), token.expand(1, 8, 8, 4))
        value = module.kv[0](module.finer_norms[0](token))[8:]
        assert_close(found, module.proj(value).expand(1, 4, 4, 8))


def test_constant_finer_maps_are_weighted_by_their_tokens_times_the_exponential_of_their_score():
    module = make([(4, 4), (6, 2)], heads=1)
    x, tokens = torch.randn(8).double(), [torch.randn(c).double() for c in (4, 6)]
    with torch.no_grad():
        maps = [tokens[0].expand(1, 16, 16, 4), tokens[1].expand(1, 8, 8, 6)]
        found = module(x.expand(1, 4, 4, 8), *maps)
        query = module.q(module.norm(x))
        pairs = zip(module.kv, module.finer_norms, tokens, strict=True)
        keys, values = torch.stack([kv(norm(t)) for kv, norm, t in pairs]).split(8, dim=1)
        # A window of 2 x 2 tokens sees 8 x 8 and 4 x 4.
        weights = torch.tensor([64, 16]) * (keys @ query / 8**0.5).exp()
        expected = module.proj(weights / weights.sum() @ values)
        assert_close(found, expected.expand(1, 4, 4, 8))


def test_gradients():
    module = make([(3, 2)], width=4)
    arguments = torch.randn(1, 2, 2, 4).double(), torch.randn(1, 4, 4, 3).double()
    arguments = [x.requires_grad_() for x in arguments]
    assert torch.autograd.gradcheck(module, arguments, fast_mode=True)
    parameters = dict(module.named_parameters())

    def of_parameters(*values):
        named = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(module, named, tuple(x.detach() for x in arguments))

    assert torch.autograd.gradcheck(of_parameters, tuple(parameters.values()), fast_mode=True)


@pytest.mark.parametrize("scale", [0, 1])
def test_the_bias_of_keys_and_values_is_an_embedding_of_the_scale(scale):
    """A large key bias along the query draws all attention to its scale."""
    module = make([(4, 4), (6, 2)], heads=1)
    x = torch.randn(1, 1, 1, 8).double().expand(1, 2, 2, 8)
    finer = [torch.randn(1, 8, 8, 4).double(), torch.randn(1, 4, 4, 6).double()]
    with torch.no_grad():
        query = module.q(module.norm(x[0, 0, 0]))
        module.kv[scale].bias[:8] += 1000 * query / query.norm()
        found = module(x, *finer)
        finer[1 - scale] += torch.randn_like(finer[1 - scale])
        assert_close(module(x, *finer), found)
        finer[scale] += torch.randn_like(finer[scale])
        assert (module(x, *finer) - found).abs().max() > 0.01
