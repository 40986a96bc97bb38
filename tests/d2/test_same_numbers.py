"""The same detections of one model and image in Detectron2, our heads in it, and standalone.

``pytest --junitxml`` records the largest differences.
"""

import pytest
import torch
from small_backbones import ATTENTION, CASCADE_FPN

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from two_hosts import (
    BACKBONES,
    EXITS,
    FAST_KERNEL,
    SAME_KERNEL,
    build_three,
    build_two,
    largest_differences,
    make_batch,
)

pytestmark = pytest.mark.needs_detectron2

LIGHT = ["mobilenet_v2", "mobilenet_v3"]


@pytest.fixture(scope="module", params=["R-18", "R-34", "R-50", "R-101", *LIGHT])
def three(request):
    return build_three(*BACKBONES[request.param], *SAME_KERNEL)


def assert_equal(got, wanted):
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.equal(ours.boxes, theirs.boxes)
        assert torch.equal(ours.scores, theirs.scores)
        assert torch.equal(ours.classes, theirs.classes)


@pytest.mark.parametrize("count", [1, 3])
def test_same_kernels_give_the_same_bits(three, count):
    own, ours, alone = (host.detect(make_batch(count)) for host in three)
    assert all(len(found) > 20 and len(found.classes.unique()) > 1 for found in own)
    assert_equal(ours, own)
    assert_equal(alone, own)
    # Without exits every region ran through all stages.
    assert {stage for found in (*ours, *alone) for stage in found.exit_stages.tolist()} == {2}


@pytest.mark.parametrize("count", [1, 3])
def test_fast_pooling_gives_the_same_detections(three, count, record_property, monkeypatch):
    own, ours, alone = three
    batch = make_batch(count)
    wanted = own.detect(batch)
    for name, host in (("plugin", ours), ("standalone", alone)):
        monkeypatch.setattr(host.cascade.pooler, "kernel", "bags")
        largest = largest_differences(host.detect(batch), wanted)
        record_property(name, largest)
        assert largest["boxes"] <= 0.01
        assert largest["scores"] <= 1e-4


@pytest.mark.parametrize("name", [*ATTENTION, *CASCADE_FPN])
def test_backbones_of_ours_give_the_same_bits(name):
    ours, alone = (host.detect(make_batch(3)) for host in build_two(*BACKBONES[name], *SAME_KERNEL))
    assert all(len(found) > 20 and len(found.classes.unique()) > 1 for found in ours)
    assert_equal(alone, ours)


@pytest.mark.parametrize("name", ["R-18", *LIGHT, "efficientvit"])
@pytest.mark.parametrize("kernel", [SAME_KERNEL, FAST_KERNEL], ids=["same", "fast"])
def test_regions_leave_alike(name, kernel):
    ours, alone = (
        host.detect(make_batch(3)) for host in build_two(*BACKBONES[name], *EXITS, *kernel)
    )
    stages = torch.cat([found.exit_stages for found in ours])
    assert stages.unique().tolist() == [0, 1, 2]
    assert_equal(alone, ours)
    assert torch.equal(torch.cat([found.exit_stages for found in alone]), stages)


@pytest.mark.parametrize(
    "options",
    [
        ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", False),
        ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", False, *EXITS),
        (
            *("MODEL.CASCADE.BOX_HEAD.NUM_CONV", (0, 1, 2)),
            *("MODEL.CASCADE.BOX_HEAD.CONV_DIM", (32,)),
            *("MODEL.CASCADE.BOX_HEAD.NUM_FC", (1, 1, 2)),
            *("MODEL.CASCADE.BOX_HEAD.FC_DIM", (16, 24, 32)),
            *("MODEL.CASCADE.BOX_HEAD.NORM", ("", "", "GN")),
        ),
        ("MODEL.CASCADE.ENSEMBLE", "last"),
        ("MODEL.CASCADE.ENSEMBLE", "mean_logits", *EXITS),
        ("MODEL.CASCADE.ENSEMBLE", "last_boxes", *EXITS),
        (
            *("MODEL.ROI_BOX_CASCADE_HEAD.IOUS", (0.5, 0.7)),
            *("MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS", ((10, 10, 5, 5), (30, 30, 15, 15))),
        ),
    ],
    ids=lambda options: " ".join(map(str, options[:2])).removeprefix("MODEL."),
)
def test_an_option_means_the_same_in_both_hosts(options):
    ours, alone = (host.detect(make_batch(2)) for host in build_two(*BACKBONES["R-18"], *options))
    assert all(len(found) > 20 for found in ours)
    assert_equal(alone, ours)
    for found, wanted in zip(alone, ours, strict=True):
        assert torch.equal(found.exit_stages, wanted.exit_stages)
