"""How many crops live at one time: they are most of the memory of the heads."""

import pytest
import torch
from memory_meter import MemoryMeter, peak_bytes
from small_cascades import CHANNELS, IOUS, NUM_CLASSES, REG_WEIGHTS, STRIDES, make_scene

from cascade_det.core import BoxPredictor, CascadeHead, ConvFCBoxHead, RoIPooler

REGIONS, SIZE = 1200, 14
CROPS = REGIONS * CHANNELS * SIZE**2 * 4


@pytest.mark.parametrize("sides", [(0.1, 0.3), (0.5, 0.9)], ids=["two levels", "one level"])
def test_crops_live_once_and_a_quarter_of_them_twice(sides):
    cascade = CascadeHead(
        pooler=RoIPooler(output_size=SIZE, strides=STRIDES, kernel="torchvision"),
        box_heads=[
            ConvFCBoxHead(in_channels=CHANNELS, pooled_size=SIZE, fc_dims=(8,)) for _ in range(3)
        ],
        box_predictors=[BoxPredictor(in_features=8, num_classes=NUM_CLASSES) for _ in range(3)],
        num_classes=NUM_CLASSES,
        ious=IOUS[:3],
        bbox_reg_weights=REG_WEIGHTS[:3],
    )
    scene = make_scene(image_sizes=((480, 640),), num_proposals=(0,), num_objects=(0,))
    least, most = sides
    far = torch.rand(REGIONS, 2) * (most - least) + least
    boxes = torch.cat([torch.zeros(REGIONS, 2), far * torch.tensor([640.0, 480.0])], 1)
    peak = peak_bytes(lambda: cascade.detect(scene.features, [boxes], scene.image_sizes))
    # A tenth for boxes, scores and indices.
    assert CROPS < peak < 1.35 * CROPS


def test_the_meter_by_hand():
    there = torch.zeros(100)
    with torch.no_grad(), MemoryMeter() as meter:
        first = torch.zeros(1000)  # 4000 bytes
        second = first + 1  # and 4000
        del first
        view = second.view(10, 100)
        del second
        there.add_(1)
        third = view[0] + there  # 4000 of the view, and 400
    assert (meter.peak, meter.now) == (8000, 4400)
    del view, third
    assert meter.now == 0
