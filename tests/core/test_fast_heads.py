"""Box heads made fast compute what they did before, in either layout and either kernel."""

import copy

import pytest
import torch
from small_cascades import make_cascade, make_scene
from torch import nn
from torch.testing import assert_close

from cascade_det.core import ConvFCBoxHead
from cascade_det.core.fast_heads import FastBoxHead, FastCopies, fast_box_heads

POOLED = 3
HEAD = {"in_channels": 4, "pooled_size": POOLED}


def head(**settings):
    return ConvFCBoxHead(**{**HEAD, "fc_dims": (16, 8), **settings})


def fast(box_head, **settings):
    settings = {"pooled_size": POOLED, "dtype": torch.float32, "keep": True, **settings}
    return fast_box_heads([box_head], **settings)[0]


def detections(cascade, scene):
    found, stats = cascade.detect(scene.features, scene.proposals, scene.image_sizes)
    return found, stats


@pytest.mark.parametrize("fc_dims", [(16,), (16, 8), (16, 8, 4)])
def test_fast_head_equals_head(fc_dims):
    plain, pooled = head(fc_dims=fc_dims), torch.randn(5, 4, POOLED, POOLED)
    made = fast(plain)
    assert isinstance(made, FastBoxHead)
    assert_close(made(pooled), plain(pooled))
    rows = torch.stack([region.permute(1, 2, 0).flatten() for region in pooled])
    assert_close(made.forward_rows(rows), plain(pooled))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_inside_and_float32_outside(dtype):
    plain, pooled = head(), torch.randn(5, 4, POOLED, POOLED)
    made = fast(plain, dtype=dtype)
    assert {p.dtype for p in made.parameters()} == {dtype}
    assert made(pooled).dtype == torch.float32
    assert_close(made(pooled), plain(pooled), rtol=0.05, atol=0.05)
    assert not torch.equal(made(pooled), plain(pooled))


def test_heads_that_are_kept_stay_as_they_are():
    plain = head()
    before = copy.deepcopy(plain.state_dict())
    fast(plain)
    assert_close(plain.state_dict(), before, rtol=0, atol=0)
    assert all(p.requires_grad for p in plain.parameters())


class Scaled(ConvFCBoxHead):
    def forward(self, pooled):
        return super().forward(pooled) * 2


@pytest.mark.parametrize(
    "plain",
    [head(conv_dims=(4,)), Scaled(**HEAD, fc_dims=(16,)), nn.Linear(3, 3)],
    ids=["convolutions", "another forward", "no sequence"],
)
def test_other_heads_stay_as_they_are(plain, caplog):
    assert fast(plain) is plain
    assert "stays as it is" in caplog.text


@pytest.mark.parametrize("kernel", ["bags", "torchvision"])
@pytest.mark.parametrize("ensemble", ["mean_probs", "last_boxes"])
def test_optimized_cascade_detects_the_same(kernel, ensemble):
    scene = make_scene()
    cascade = make_cascade(ensemble=ensemble).eval()
    cascade.pooler.kernel = kernel
    expected, expected_stats = detections(cascade, scene)
    cascade.optimize()
    assert all(isinstance(made, FastBoxHead) for made in cascade.box_head)
    found, stats = detections(cascade, scene)
    assert stats == expected_stats
    for ours, theirs in zip(found, expected, strict=True):
        assert len(theirs)
        assert_close(vars(ours), vars(theirs), rtol=1e-4, atol=1e-4)


def test_head_that_is_not_fast_pools_in_the_type_of_the_features():
    scene, cascade = make_scene(), make_cascade().eval()
    plain = copy.deepcopy(cascade.box_head[2])
    cascade.optimize(torch.bfloat16)
    cascade.box_head[2] = plain
    assert all(len(found) for found in detections(cascade, scene)[0])


def test_optimized_cascade_without_proposals():
    scene = make_scene(num_proposals=(0, 0))
    cascade = make_cascade().eval()
    cascade.optimize(torch.bfloat16)
    assert [len(found) for found in detections(cascade, scene)[0]] == [0, 0]


def test_optimized_stages_are_those_of_the_plain_cascade():
    scene, cascade = make_scene(), make_cascade().eval()
    arguments = (scene.features, scene.proposals, scene.image_sizes)
    expected = cascade.detect_stages(*arguments)
    cascade.optimize()
    for ours, theirs in zip(cascade.detect_stages(*arguments), expected, strict=True):
        assert_close(ours.boxes_after, theirs.boxes_after, rtol=1e-4, atol=1e-3)


def test_copies_follow_weights():
    heads = nn.ModuleList([head(), head()])
    copies = FastCopies(pooled_size=POOLED, dtype=torch.float32, device=torch.device("cpu"))
    pooled = torch.randn(3, 4, POOLED, POOLED)
    first = copies.get(heads)
    assert copies.get(heads) is first
    with torch.no_grad():
        heads[1].fc1.weight.mul_(2)
    assert_close(copies.get(heads)[1](pooled), heads[1](pooled))
    heads[0].load_state_dict(head().state_dict())
    assert_close(copies.get(heads)[0](pooled), heads[0](pooled))
    heads[0].fc1.weight.data = torch.randn(16, 36)
    assert_close(copies.get(heads)[0](pooled), heads[0](pooled))
