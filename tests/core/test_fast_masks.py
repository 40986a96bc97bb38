"""Mask heads made fast compute what they did before, in either layout and either kernel."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from small_cascades import CHANNELS, NUM_CLASSES, STRIDES, make_cascade, make_scene
from torch import nn
from torch.testing import assert_close

from cascade_det.core import ConvUpsampleMaskHead, MaskBranch, RoIPooler, fast_masks
from cascade_det.core.fast_masks import FastMaskHead, fast_mask_heads

SIZE, CLASSES = 7, 3


def make_head(**changes):
    arguments = {"in_channels": 6, "conv_dims": (32, 32), "upsampled_dim": 5, "num_masks": CLASSES}
    return drawn(ConvUpsampleMaskHead(**arguments | changes)).eval()


def drawn(head):
    """The head with masks of both kinds, biases, and norms with statistics."""
    nn.init.normal_(head.predictor.weight, std=head.predictor.in_channels**-0.5)
    for name, value in [*head.named_parameters(), *head.named_buffers()]:
        if name.endswith(("bias", "running_mean")):
            nn.init.normal_(value, std=0.3)
        elif "norm" in name and value.is_floating_point():
            nn.init.uniform_(value, 0.5, 2.0)
    return head


def fast(head, dtype=torch.float32):
    made = fast_mask_heads([head], dtype=dtype)[0]
    assert isinstance(made, FastMaskHead)
    return made


def crops(regions, channels=6, size=SIZE):
    return torch.randn(regions, channels, size, size), torch.randint(CLASSES, (regions,))


def rows_of(pooled):
    return torch.stack([region.permute(1, 2, 0).flatten() for region in pooled])


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("norm", ["", "GN", "BN", "FrozenBN"])
@pytest.mark.parametrize("channels", [32, 128], ids=["direct", "Winograd"])
@torch.no_grad()
def test_fast_head_equals_head(norm, channels, threads, monkeypatch):
    monkeypatch.setattr(fast_masks, "_PIECE_BYTES", 9000 * channels)  # a few regions
    head = make_head(
        in_channels=channels, conv_dims=(channels,) * 2, upsampled_dim=channels, norm=norm
    )
    pooled, classes = crops(11, channels)
    made, expected = fast(head), head(pooled, classes).sigmoid()
    assert_close(made(pooled, classes).sigmoid(), expected, rtol=0, atol=1e-5)
    assert_close(made.forward_rows(rows_of(pooled), classes).sigmoid(), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.1


@pytest.mark.parametrize("conv_dims", [(), (32,), (32, 64, 32)])
@pytest.mark.parametrize("num_masks", [1, CLASSES])
@pytest.mark.parametrize("regions", [0, 1, 4])
@torch.no_grad()
def test_any_layers_and_masks(conv_dims, num_masks, regions):
    head = make_head(conv_dims=conv_dims, num_masks=num_masks)
    pooled, classes = crops(regions)
    assert_close(fast(head)(pooled, classes), head(pooled, classes), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["", "GN"])
@torch.no_grad()
def test_lower_precision_inside_and_float32_outside(dtype, norm):
    head = make_head(norm=norm)
    pooled, classes = crops(5)
    made, expected = fast(head, dtype), head(pooled, classes)
    assert {p.dtype for p in made.parameters()} == {dtype}
    logits = made.forward_rows(rows_of(pooled).to(dtype), classes)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, expected)
    assert (logits - expected).abs().mean() < 0.01 * expected.abs().mean()


def test_the_head_stays_as_it_is_and_no_random_number_is_drawn():
    head = make_head(norm="BN")
    before, state = copy.deepcopy(head.state_dict()), torch.get_rng_state()
    made = fast(head)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in made.modules())
    assert_close(head.state_dict(), before, rtol=0, atol=0)
    assert all(p.requires_grad for p in head.parameters())


def test_gradients_are_those_of_the_head():
    head = make_head()
    pooled, classes = crops(3)
    grads = []
    for each in (head, fast(head)):
        own = pooled.clone().requires_grad_()
        each(own, classes).sigmoid().sum().backward()
        grads.append(own.grad)
    assert_close(*grads, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_threads_share_a_head():
    head = make_head(in_channels=128, conv_dims=(128,), upsampled_dim=8)
    made, inputs = fast(head), [crops(regions, 128) for regions in (1, 3, 9, 2, 5, 4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: made(*x), inputs * 3))
    for logits, given in zip(found, inputs * 3, strict=True):
        assert_close(logits, head(*given), rtol=1e-4, atol=1e-4)


class Sharpened(ConvUpsampleMaskHead):
    def forward(self, pooled, classes):
        return super().forward(pooled, classes) * 2


class Positioned(ConvUpsampleMaskHead):
    """One more channel goes into the first convolution."""

    def forward(self, pooled, classes):
        return super().forward(torch.cat([pooled, pooled[:, :1]], dim=1), classes)


LAYERS = {"conv_dims": (8,), "upsampled_dim": 5, "num_masks": 2}


@pytest.mark.parametrize(
    "head",
    [
        drawn(Sharpened(in_channels=6, **LAYERS)),
        drawn(Positioned(in_channels=7, **LAYERS)),
        nn.Conv2d(6, 2, 3),
    ],
    ids=["another forward", "other channels", "other layers"],
)
def test_other_heads_stay_as_they_are(head, caplog):
    assert fast_mask_heads([head], dtype=torch.float32)[0] is head
    assert "stays as it is" in caplog.text


def with_masks(kind=ConvUpsampleMaskHead, *, heads=1, kernel="auto"):
    """A cascade of three stages with mask heads."""
    cascade = make_cascade().eval()
    layers = {"in_channels": CHANNELS, **LAYERS, "num_masks": NUM_CLASSES}
    made = [drawn(kind(**layers)) for _ in range(heads)]
    pooler = RoIPooler(output_size=4, strides=STRIDES, kernel=kernel)
    head = made[0] if heads == 1 else nn.ModuleList(made)
    cascade.masks, cascade.mask_head = MaskBranch(head.eval(), pooler), head
    cascade.pooler.kernel = kernel
    return cascade


def detect(cascade, scene):
    return cascade.detect(scene.features, scene.proposals, scene.image_sizes)[0]


@pytest.mark.parametrize("kernel", ["bags", "torchvision"])
@pytest.mark.parametrize("heads", [1, 3])
@torch.no_grad()
def test_optimized_cascade_makes_the_same_masks(heads, kernel):
    scene, cascade = make_scene(), with_masks(heads=heads, kernel=kernel)
    expected = detect(cascade, scene)
    stages = cascade.detect_stages(scene.features, scene.proposals, scene.image_sizes)
    cascade.optimize()
    assert cascade.mask_head is cascade.masks.head
    assert all(isinstance(head, FastMaskHead) for head in cascade.masks.heads)
    assert len(cascade.masks.heads) == heads
    for ours, theirs in zip(detect(cascade, scene), expected, strict=True):
        assert len(theirs)
        assert_close(ours.masks, theirs.masks, rtol=0, atol=1e-4)
    found = cascade.detect_stages(scene.features, scene.proposals, scene.image_sizes)
    for stage, wanted in zip(found, stages, strict=True):
        for ours, theirs in zip(stage.detections, wanted.detections, strict=True):
            assert_close(ours.masks, theirs.masks, rtol=0, atol=1e-4)


@pytest.mark.parametrize("proposals", [(24, 17), (0, 0), (0, 9)])
@torch.no_grad()
def test_masks_of_no_detections(proposals):
    scene, cascade = make_scene(num_proposals=proposals), with_masks()
    cascade.optimize(torch.bfloat16)
    for detections in detect(cascade, scene):
        assert detections.masks.shape == (len(detections), 8, 8)


@torch.no_grad()
def test_a_plain_mask_head_beside_box_heads_in_another_type():
    scene, cascade = make_scene(), with_masks(Sharpened)
    cascade.optimize(torch.bfloat16)
    assert isinstance(cascade.mask_head, Sharpened)
    assert all(d.masks.dtype == torch.float32 for d in detect(cascade, scene))


@torch.no_grad()
def test_masks_left_out_stay_empty():
    scene, cascade = make_scene(), with_masks()
    cascade.optimize()
    threshold = float(detect(cascade, scene)[0].scores.median())
    rules = replace(cascade.masks.rules, score_threshold=threshold)
    cascade.masks = replace(cascade.masks, rules=rules)
    for detections in detect(cascade, scene):
        assert torch.equal(detections.masks.flatten(1).any(dim=1), detections.scores >= threshold)


class OfOneClass(nn.Module):
    """Detectron2's inference with its head."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, pooled, classes):
        from detectron2.modeling.roi_heads.mask_head import mask_rcnn_inference
        from detectron2.structures import Instances

        instances = Instances((9, 9), pred_classes=classes)
        mask_rcnn_inference(self.head.layers(pooled), [instances])
        return instances.pred_masks[:, 0].logit()


@pytest.mark.needs_detectron2
@pytest.mark.parametrize("norm", ["", "GN", "BN", "FrozenBN"])
@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("channels", [32, 128], ids=["direct", "Winograd"])
@torch.no_grad()
def test_detectron2_head_gives_the_same(norm, agnostic, channels):
    pytest.importorskip("detectron2.engine", exc_type=ImportError)
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead

    theirs = OfOneClass(
        MaskRCNNConvUpsampleHead(
            ShapeSpec(channels=channels, height=14, width=14),
            num_classes=1 if agnostic else CLASSES,
            conv_dims=[channels] * 3,
            conv_norm=norm,
        )
    ).eval()
    nn.init.normal_(theirs.head.predictor.weight, std=0.1)
    made, (pooled, classes) = fast(theirs), crops(5, channels, 14)
    expected = theirs(pooled, classes).sigmoid()
    assert_close(made(pooled, classes).sigmoid(), expected, rtol=0, atol=1e-5)
