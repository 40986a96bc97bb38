"""What box heads compute for a region, against products of their widths."""

from __future__ import annotations

import pytest
import torch
from small_cascades import CHANNELS, NUM_CLASSES, POOLED, make_cascade, make_scene

from cascade_det.core import ConvUpsampleMaskHead, MaskBranch, RoIPooler
from cascade_det.core.structures import DetectorOutput
from cascade_det.engine.head_flops import mask_flops, region_flops
from cascade_det.evaluation import ExitEvaluator

LOGITS = NUM_CLASSES + 1
INPUTS = CHANNELS * POOLED**2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"fc_dims": (12, 7)}, INPUTS * 12 + 12 * 7 + 7 * (LOGITS + 4)),
        (
            {"fc_dims": (12,), "cls_agnostic": False},
            INPUTS * 12 + 12 * (LOGITS + 4 * NUM_CLASSES),
        ),
        (
            {"conv_dims": (5,), "fc_dims": ()},
            INPUTS * 5 * 9 + 5 * POOLED**2 * (LOGITS + 4),
        ),
    ],
    ids=["linear layers", "boxes of each class", "convolutions of 3 x 3 taps"],
)
def test_one_multiply_add_for_each_weight_and_position(changes, expected):
    """Biases and activations are not counted."""
    flops = region_flops(make_cascade(**changes), CHANNELS)
    assert flops.stages == (expected,) * 3
    assert flops.scores == (0, 0, 0)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(("heads", "num_masks"), [(1, 80), (1, 1), (3, 5)])
def test_a_mask_has_one_class(heads, num_masks, fast):
    """Two convolutions of 3 x 3 taps, four taps per crop cell, and one class in four cells each."""
    made = [
        ConvUpsampleMaskHead(
            in_channels=CHANNELS, conv_dims=(5, 7), upsampled_dim=4, num_masks=num_masks
        )
        for _ in range(heads)
    ]
    pooler = RoIPooler(output_size=6, strides=(4, 8))
    masks = MaskBranch(made[0] if heads == 1 else torch.nn.ModuleList(made), pooler)
    masks = masks.optimized(torch.float32) if fast else masks
    of_cell = 9 * CHANNELS * 5 + 9 * 5 * 7 + 4 * 7 * 4 + 4 * 4
    assert mask_flops(masks, CHANNELS) == heads * 36 * of_cell


def test_heads_that_run_again_count_again():
    flops = region_flops(make_cascade(ensemble="last_boxes"), CHANNELS)
    one = flops.stages[0]
    assert flops.scores == (one, 2 * one, 3 * one)


@pytest.mark.parametrize("ensemble", ["mean_probs", "last_boxes"])
def test_the_sum_is_what_the_layers_of_a_run_compute(ensemble):
    """Counted by hooks on every linear layer, while the cascade detects."""
    cascade = make_cascade(ensemble=ensemble, fc_dims=(12, 7)).eval()
    scene = make_scene()
    counted = []
    for layer in (m for m in cascade.modules() if isinstance(m, torch.nn.Linear)):
        layer.register_forward_hook(
            lambda m, inputs, _: counted.append(len(inputs[0]) * m.in_features * m.out_features)
        )
    flops = region_flops(cascade, CHANNELS)
    counted.clear()
    with torch.no_grad():
        found, stats = cascade.detect(scene.features, scene.proposals, scene.image_sizes)
    evaluator = ExitEvaluator(flops)
    evaluator.process([{}, {}], DetectorOutput(found, stats))
    figures = evaluator.evaluate()["exits"]
    assert sum(counted) > 0
    assert figures["head_gflops_per_image"] * 2e9 == pytest.approx(sum(counted))
    assert figures["head_flops_share"] == 1


def test_modes_and_gradients_are_left_alone():
    cascade = make_cascade().train()
    region_flops(cascade, CHANNELS)
    assert all(module.training for module in cascade.modules())
    assert all(parameter.grad is None for parameter in cascade.parameters())
