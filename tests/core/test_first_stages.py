"""A shorter cascade is the one that was built with so many stages."""

import pytest
import torch
from small_cascades import (
    CHANNELS,
    NUM_CLASSES,
    STRIDES,
    assert_same_detections,
    detect,
    make_cascade,
    make_scene,
)
from torch import nn

from cascade_det.core import ConvUpsampleMaskHead, MaskBranch, RoIPooler
from cascade_det.core.first_stages import first_stages


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("fast", [False, True])
def test_it_detects_as_one_that_was_built_short(count, fast):
    arguments = {"score_thresh": 0.1, "nms_thresh": 0.4, "detections_per_image": 7}
    arguments |= {"suppression": "soft_gaussian", "suppression_sigma": 0.3}
    full = make_cascade(num_stages=3, **arguments).eval()
    built = make_cascade(num_stages=count, **arguments).eval()
    built.load_state_dict(
        {name: full.state_dict()[name] for name in built.state_dict()}, strict=True
    )
    if fast:
        for cascade in (full, built):
            cascade.optimize()
    scene = make_scene()
    before, wanted = detect(full, scene)[0], detect(built, scene)[0]
    found, stats = detect(first_stages(full, count), scene)
    assert len(stats.entered) == count
    assert max(map(len, found)) > 0
    assert_same_detections(found, wanted)
    assert_same_detections(detect(full, scene)[0], before, exact=True)


@pytest.mark.parametrize("per_stage", [False, True])
def test_masks_are_those_of_the_stages_that_are_kept(per_stage):
    heads = [
        ConvUpsampleMaskHead(
            in_channels=CHANNELS, conv_dims=(5,), upsampled_dim=4, num_masks=NUM_CLASSES
        )
        for _ in range(3 if per_stage else 1)
    ]
    pooler = RoIPooler(output_size=4, strides=STRIDES)
    full, short = make_cascade(num_stages=3), make_cascade(num_stages=2)
    short.load_state_dict({name: full.state_dict()[name] for name in short.state_dict()})
    full.set_masks(MaskBranch(nn.ModuleList(heads) if per_stage else heads[0], pooler))
    short.set_masks(MaskBranch(nn.ModuleList(heads[:2]) if per_stage else heads[0], pooler))
    scene = make_scene()
    with torch.no_grad():
        found, wanted = (detect(c, scene)[0] for c in (first_stages(full, 2), short))
    for got, want in zip(found, wanted, strict=True):
        assert len(got) > 0
        torch.testing.assert_close(got.masks, want.masks, rtol=0, atol=0)


def test_limits():
    cascade = make_cascade(num_stages=2)
    assert first_stages(cascade, 2) is cascade
    for count in (0, 3):
        with pytest.raises(ValueError, match="of 2"):
            first_stages(cascade, count)
