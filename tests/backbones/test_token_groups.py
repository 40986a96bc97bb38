"""Attention in groups of tokens, against a loop over groups, heads and tokens."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from cascade_det.backbones.token_groups import TokenGroupAttention


def make(groups, *, width=6, heads=2):
    torch.manual_seed(0)
    return TokenGroupAttention(width=width, heads=heads, groups=groups).double()


def one_query(module, query, keys_and_values):
    """Attention of one token ``[C]`` to tokens, through the output projection."""
    width = len(query)
    keys, values = keys_and_values.split(width, dim=1)
    found = []
    for part in torch.arange(width).chunk(module.heads):
        scores = keys[:, part] @ query[part] / len(part) ** 0.5
        found.append(scores.softmax(0) @ values[:, part])
    return module.proj(torch.cat(found))


def by_loop(module, tokens):
    """The definition for one image ``[N, C]``, token by token."""
    count, width = tokens.shape
    number = min(module.groups, count)
    parts = torch.arange(count).tensor_split([count * g // number for g in range(1, number)])
    means = [tokens[part].mean(0) for part in parts]
    projected = module.qkv(torch.stack(means))
    summaries = [
        mean + one_query(module, row[:width], projected[:, width:])
        for mean, row in zip(means, projected, strict=True)
    ]
    outputs = []
    for g, part in enumerate(parts):
        seen = module.qkv(torch.cat([tokens[part], torch.stack(summaries)]))
        results = [one_query(module, seen[i, :width], seen[:, width:]) for i in range(len(part))]
        outputs += results
        summaries[g] = torch.stack(results).mean(0)
    return torch.stack(outputs)


@pytest.mark.parametrize(
    ("count", "groups"), [(12, 3), (13, 4), (7, 1), (5, 5), (3, 4), (1, 1), (1, 3)]
)
def test_equals_the_loop_image_by_image(count, groups):
    module = make(groups)
    tokens = torch.randn(2, count, 6).double()
    with torch.no_grad():
        found = module(tokens)
        for image in range(2):
            assert_close(found[image], by_loop(module, tokens[image]))


def test_one_group_is_plain_attention_over_its_tokens_and_their_summary():
    module = make(1, heads=1)
    tokens = torch.randn(9, 6).double()
    with torch.no_grad():
        mean = tokens.mean(0)
        summary = mean + module.proj(module.qkv(mean)[12:])  # a lone summary attends to itself
        queries, keys, values = module.qkv(torch.vstack([tokens, summary])).chunk(3, dim=1)
        weights = (queries[:-1] @ keys.T / 6**0.5).softmax(1)
        assert_close(module(tokens[None])[0], module.proj(weights @ values))


def test_information_flows_forward_except_through_the_first_summaries():
    """A change that keeps the mean of a group keeps its first summary."""
    module = make(4)
    tokens = torch.randn(1, 14, 6).double()
    with torch.no_grad():
        before = module(tokens)
        changed = tokens.clone()
        noise = torch.randn(4, 6).double()
        changed[0, 3:7] += noise - noise.mean(0)  # the second group: 14 / 4 = 3.5 tokens each
        differs = (module(changed) - before)[0].abs().amax(1) > 1e-9
        assert torch.equal(differs, torch.arange(14) >= 3)
        changed[0, 3:7] += 1
        assert ((module(changed) - before)[0].abs().amax(1) > 1e-9).all()


def test_gradients():
    module = make(3, width=4)
    tokens = torch.randn(1, 7, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(module, [tokens], fast_mode=True)


@pytest.mark.parametrize(("count", "groups"), [(64, 1), (64, 4), (100, 8)])
def test_scores_are_as_many_as_stated(count, groups):
    """Counted from multiply-adds: two products of width C per score."""
    module = TokenGroupAttention(width=32, heads=2, groups=groups)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module(torch.randn(1, count, 32))
    products = sum(flops for op, flops in counter.flop_counts["Global"].items() if "bmm" in str(op))
    small, larger = divmod(count, groups)  # sizes differ by one at most
    sizes = [small + (g < larger) for g in range(groups)]
    scores = groups**2 + sum(n * (n + groups) for n in sizes)
    assert products / 2 == 2 * 32 * scores


def test_torch_export_takes_other_numbers_of_tokens():
    module = make(2)
    count = torch.export.Dim("count", min=4, max=4096)
    program = torch.export.export(
        module,
        (torch.randn(2, 10, 6).double(),),
        dynamic_shapes=({1: count},),
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    for other in (5, 16, 50):
        tokens = torch.randn(2, other, 6).double()
        assert_close(program.module()(tokens), module(tokens))
