"""Cascaded group attention against loops over windows, heads and tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from cascade_det.backbones.cascaded_attention import CascadedGroupAttention
from cascade_det.backbones.relative_bias import gather_biases
from cascade_det.layers.folding import fold_norms


def make_attention(*, channels=8, heads=2, kernels=(3, 1), window=2, seed=0):
    """With random norms and biases, float64, in evaluation mode."""
    torch.manual_seed(seed)
    attention = CascadedGroupAttention(channels, heads=heads, kernels=kernels, window=window)
    for name, tensor in attention.state_dict().items():
        if name.endswith(("weight", "running_var")):
            tensor.uniform_(0.5, 1.5).mul_(torch.where(torch.rand_like(tensor) < 0.3, -1, 1))
            if name.endswith("running_var"):
                tensor.abs_()
        elif tensor.is_floating_point():
            tensor.normal_()
    for qkv in attention.qkvs:
        qkv.c.weight.data.mul_(0.3)
    return attention.double().eval()


def normalise(norm, x):
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return (x - norm.running_mean) * scale + norm.bias


def attend_by_loops(attention, maps, window):
    """One image ``[C, H, W]``."""
    channels, height, width = maps.shape
    rows, columns = (math.ceil(side / window) for side in (height, width))
    padded = maps.new_zeros(channels, rows * window, columns * window)
    padded[:, :height, :width] = maps
    result = torch.zeros_like(padded)
    for row in range(0, rows * window, window):
        for column in range(0, columns * window, window):
            part = (..., slice(row, row + window), slice(column, column + window))
            result[part] = attend_in_window(attention, padded[part], window)
    return result[:, :height, :width]


def attend_in_window(attention, maps, window):
    heads, places = len(attention.qkvs), [(i, j) for i in range(window) for j in range(window)]
    size = maps.shape[0] // heads
    before = torch.zeros(size, window, window, dtype=maps.dtype)
    outputs = []
    for head in range(heads):
        x = maps[head * size : (head + 1) * size] + before
        qkv, dw = attention.qkvs[head], attention.dws[head]
        tokens = {p: normalise(qkv.bn, qkv.c.weight[:, :, 0, 0] @ x[:, p[0], p[1]]) for p in places}
        reach = dw.c.kernel_size[0] // 2
        after = torch.zeros_like(x)
        for i, j in places:
            query = sum(
                dw.c.weight[:, 0, k - i + reach, m - j + reach] * tokens[k, m][:16]
                for k, m in places
                if abs(k - i) <= reach and abs(m - j) <= reach
            )
            query = normalise(dw.bn, query)
            scores = torch.stack(
                [
                    query @ tokens[k, m][16:32] / 4
                    + attention.attention_biases[head, abs(k - i) * window + abs(m - j)]
                    for k, m in places
                ]
            )
            weights = scores.exp() / scores.exp().sum()
            values = [tokens[p][32:] for p in places]
            after[:, i, j] = sum(w * v for w, v in zip(weights, values, strict=True))
        outputs.append(after)
        before = after
    mixed, proj = torch.cat(outputs).clamp(min=0), attention.proj[1]
    result = torch.zeros_like(mixed)
    for i, j in places:
        result[:, i, j] = normalise(proj.bn, proj.c.weight[:, :, 0, 0] @ mixed[:, i, j])
    return result


@settings(max_examples=12)
@given(
    heads=st.integers(1, 3),
    kernels=st.permutations([1, 3, 5]),
    window=st.integers(1, 3),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_attention_is_that_of_loops(heads, kernels, window, height, width, seed):
    attention = make_attention(
        channels=2 * heads, heads=heads, kernels=kernels, window=window, seed=seed
    )
    maps = torch.randn(2, 2 * heads, height, width, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([attend_by_loops(attention, image, window) for image in maps])
        assert_close(attention(maps), expected)
        fold_norms(attention)
        gather_biases(attention)
        assert_close(attention(maps), expected)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_derivatives(training):
    attention = make_attention(channels=4, window=2).train(training)
    maps = torch.randn(1, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    parameters = dict(attention.named_parameters())
    names = ["attention_biases", "qkvs.1.c.weight", "qkvs.0.bn.weight", "dws.0.bn.bias"]

    def run(maps, *values):
        given_ = dict(zip(names, values, strict=True))
        return torch.func.functional_call(attention, {**parameters, **given_}, (maps,))

    assert torch.autograd.gradcheck(run, (maps, *(parameters[name] for name in names)))


def test_a_window_with_one_token_more_than_the_map():
    # Padded tokens take part: they change the output.
    maps = torch.randn(1, 8, 2, 2, dtype=torch.float64)
    attention = make_attention(window=3)
    with torch.no_grad():
        assert_close(attention(maps)[0], attend_by_loops(attention, maps[0], 3))
        smaller = make_attention(window=2)
        assert not torch.equal(attention(maps), smaller(maps))


def test_fewer_kernels_than_heads_are_an_error():
    with pytest.raises(ValueError, match=r"3 heads need as many kernels, not \(5, 3\)"):
        CascadedGroupAttention(6, heads=3, kernels=(5, 3), window=7)
